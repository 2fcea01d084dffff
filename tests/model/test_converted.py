"""Models that transformers made and llama.cpp's own tools converted and quantized.

Neither is needed here but transformers: what llama.cpp answered stands beside the files. Prompts
are four times yarn's original context. converted/README.md says how everything was made.
"""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import ktlab
from ktlab.kernels import native
from ktlab.model.model import Model
from tests.model.make_converted import CASES, FOLDER, ORIGINAL_CONTEXT, PROMPT
from tests.model.peer import transformers_model

FILES = [(name, format) for name, case in CASES.items() for format in case.formats]
QUANTIZED = [(name, format) for name, format in FILES if format != "f32"]


@cache
def answers() -> dict[str, NDArray[Any]]:
    with np.load(FOLDER / "answers.npz") as kept:
        return dict(kept)


def opened(name: str, format: str) -> tuple[Model, Tensor]:
    ids = answers()[f"{name} ids"].astype(np.int64)
    return ktlab.load(FOLDER / f"{name}-{format}.gguf"), torch.from_numpy(ids)


def mean_kl(expected: Tensor, found: Tensor) -> float:
    expected, found = (logits.double().log_softmax(-1) for logits in (expected, found))
    return float((expected.exp() * (expected - found)).sum(-1).mean())


@cache
def on_the_dequantized_weights(name: str, format: str) -> Tensor:
    model, ids = opened(name, format)
    with torch.no_grad():
        logits_TV: Tensor = transformers_model(model.checkpoint)(ids[None]).logits[0]
    return logits_TV


@pytest.mark.parametrize(("name", "format"), FILES)
def test_float32_kernels_against_transformers(name: str, format: str) -> None:
    model, ids = opened(name, format)
    yarn = model.config.yarn
    assert yarn is not None and yarn.original_context == ORIGINAL_CONTEXT == PROMPT // 4
    with model.override(backend="torch"):
        found = model.forward(ids)
    assert mean_kl(on_the_dequantized_weights(name, format), found) < 1e-9
    if format == "f32":
        # The model that was converted, before any of its names was read here (kept in float16).
        for who in (f"{name} transformers", f"{name}-f32 llama.cpp"):
            assert mean_kl(torch.from_numpy(answers()[who]), found) < 2e-6, who


@pytest.mark.parametrize("name", [name for name, format in FILES if format == "f32"])
def test_greedy_text_is_llama_cpp_s(name: str) -> None:
    model, ids = opened(name, "f32")
    written = answers()[f"{name}-f32 written"].tolist()
    found = [t.id for t in model.stream(ids, max_new_tokens=len(written), stop_at_eos=False)]
    assert found == written


@pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())
@pytest.mark.parametrize("isa", ["serial", "avx2", "avx512_vnni", "amx_bf16"])
@pytest.mark.parametrize(("name", "format"), QUANTIZED)
def test_native_kernels_lose_no_more_than_llama_cpp(name: str, format: str, isa: str) -> None:
    """Both round activations, and here and there another expert is selected."""
    if native.isas()[isa]:
        pytest.skip(native.isas()[isa])
    model, ids = opened(name, format)
    expected = on_the_dequantized_weights(name, format)
    theirs = torch.from_numpy(answers()[f"{name}-{format} llama.cpp"])
    with model.override(backend="native", isa=isa):
        assert mean_kl(expected, model.forward(ids)) < 1.5 * mean_kl(expected, theirs)


def test_the_quantizer_s_mixture_of_formats() -> None:
    formats = {name: opened(name, "q4_k_m")[0].settings.formats for name in ("v3-wide", "v2-wide")}
    assert formats["v3-wide"]["experts"] == "q4_k+q6_k"
    assert formats["v2-wide"]["experts"] == "q4_k+q8_0"  # rows of 96
    assert formats["v2-wide"]["attention"] == "q4_k+q5_0"
