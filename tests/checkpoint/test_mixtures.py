"""File types against llama.cpp's own quantizer, tensor by tensor."""

import json
from dataclasses import replace

import pytest

from ktlab.checkpoint.mixtures import BASES, mixture
from ktlab.checkpoint.names import expected_tensors
from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG
from ktlab.errors import FormatError
from tests.checkpoint.make_llama_quantize import CASES, FILE_TYPES, RECORD, by_part, tensors

RECORDED = json.loads(RECORD.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file_type", FILE_TYPES)
@pytest.mark.parametrize("case", CASES)
def test_every_tensor_gets_what_llama_cpp_gives_it(case: str, file_type: str) -> None:
    layers, experts = CASES[case]
    config = replace(TINY_TEST_CONFIG, num_experts=experts, n_group=1, topk_group=1, top_k=2)
    found = mixture(file_type, tensors(case, layers, experts), config)
    assert by_part({name: f.name for name, f in found.items()}) == RECORDED[case][file_type]


def test_every_file_type_is_recorded() -> None:
    assert set(BASES) == {*FILE_TYPES, "f32"}


def test_order_of_the_tensors_does_not_matter() -> None:
    shapes = tensors("deepseek2 fused", 10, 4)
    backwards = dict(reversed(shapes.items()))
    assert mixture("q4_k_m", backwards, TINY_TEST_CONFIG) == mixture(
        "q4_k_m", shapes, TINY_TEST_CONFIG
    )


def test_one_format_for_all_matrices() -> None:
    """Also one that no file can hold; norms and gates stay float32."""
    shapes = expected_tensors(TINY_TEST_CONFIG)
    found = mixture("int8_channel", shapes, TINY_TEST_CONFIG)
    assert found["blk.1.ffn_up_exps.weight"].name == found["output.weight"].name == "int8_channel"
    assert found["blk.1.ffn_gate_inp.weight"].name == found["output_norm.weight"].name == "f32"


def test_unknown_file_type() -> None:
    with pytest.raises(FormatError, match='unknown file type "q4_k_n"; did you mean "q4_k'):
        mixture("q4_k_n", expected_tensors(TINY_TEST_CONFIG), TINY_TEST_CONFIG)
