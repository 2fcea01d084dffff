"""Hugging Face folders that do not hold what they should: always CheckpointError, all faults."""

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ktlab.checkpoint import open_checkpoint
from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.errors import CheckpointError
from ktlab.model.model import Model
from tests.model.peer import transformers_model

Config = dict[str, Any]
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    transformers_model(synthesize(TINY_TEST_CONFIG)).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "model")
    return tmp_path / "model"


def refused(folder: Path, *expected: str) -> str:
    tracemalloc.start()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    for part in expected:
        assert part in str(caught.value)
    return str(caught.value)


def config(folder: Path, **changes: object) -> Path:
    """config.json changed; `...` removes a key."""
    file = folder / "config.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    return folder


def weights(folder: Path, change: Callable[[Weights], object]) -> Path:
    file = folder / "model.safetensors"
    content = load_file(file)
    change(content)
    save_file(content, file)
    return folder


def test_missing_keys_all_together(folder: Path) -> None:
    gone = ("hidden_size", "kv_lora_rank", "q_lora_rank", "rms_norm_eps", "num_experts_per_tok")
    message = refused(config(folder, **dict.fromkeys(gone, ...)), "model/config.json: 5 problems")
    for key in gone:
        assert f"{key} is missing (expected" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "llama"}, "model_type 'llama'; expected one of \"deepseek_v2\" (Deep"),
        ({"model_type": "deepseek_v33"}, 'did you mean "deepseek_v3"'),
        ({"model_type": ...}, "model_type None; expected one of"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; this kit computes 'silu' only"),
        ({"attention_bias": True}, "attention_bias is True; this kit computes False only"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"topk_method": "sinkhorn"}, "topk_method is 'sinkhorn'"),
        ({"num_attention_heads": "16"}, "num_attention_heads is '16', expected a whole number"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1, expected a number >= 0"),
        ({"rope_parameters": 3}, "rope_parameters is 3, expected an object or null"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.rope_type is 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor is missing"),
        ({"n_group": 3}, "impossible configuration: 16 experts do not divide into 3 groups"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq'"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
            "weight_block_size is [128]",
        ),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers make 1073741824, but the files"),
        ({"n_routed_experts": 2**30}, "but the files hold only"),
    ],
)
def test_configurations(folder: Path, changes: Config, expected: str) -> None:
    refused(config(folder, **changes), "config.json", expected)


def test_a_folder_without_a_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, "config.json is missing")
    (folder / "config.json").write_text('{"model_type": "deepseek_v3"')
    refused(folder, "config.json is no JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, "holds a list, expected a JSON object")


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "is a folder without", "*.safetensors")


def test_a_file_of_the_folder_names_it(folder: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        assert open_checkpoint(folder / name).path == folder


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
OUTPUT = "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: w.pop(OUTPUT), [f"{OUTPUT} is missing (expected shape (64, 128))"]),
        (
            lambda w: [w.pop(EXPERT.replace("3", n)) for n in "368"],
            [f"{EXPERT} and 2 more experts are missing (expected shape (32, 64))"],
        ),
        (
            lambda w: w.update({OUTPUT: torch.zeros(64, 64), EXPERT: torch.zeros(3)}),
            ["has shape (64, 64), expected (64, 128)", "has shape (3,), expected (32, 64)"],
        ),
        (
            lambda w: w.update({OUTPUT: torch.zeros(64, 128, dtype=torch.int8)}),
            [f"{OUTPUT} is of type I8, expected one of F32, F16, BF16, F8_E4M3"],
        ),
        (
            lambda w: w.update({EXPERT: w[EXPERT].float()}),
            ["the other experts of its layer are BF16 and F32, expected one"],
        ),
        (
            lambda w: w.update({"model.layers.1.self_attn.q_a_proj.bias": torch.zeros(32)}),
            ["model.layers.1.self_attn.q_a_proj.bias has no place in a model of this kind"],
        ),
        (
            lambda w: w.update({OUTPUT: w[OUTPUT].to(torch.float8_e4m3fn)}),
            [f"{OUTPUT}_scale_inv is missing, the block scales of an F8_E4M3 tensor"],
        ),
        (
            lambda w: w.update(
                {
                    OUTPUT: w[OUTPUT].to(torch.float8_e4m3fn),
                    f"{OUTPUT}_scale_inv": torch.ones(2, 1),
                }
            ),
            [f"{OUTPUT}_scale_inv is F32 (2, 1), expected F32 (1, 1)"],
        ),
    ],
)
def test_weights(folder: Path, change: Callable[[Weights], object], expected: list[str]) -> None:
    refused(weights(folder, change), "model", *expected)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_configuration_is_refused_or_read(
    whole: Path, tmp_path: Path, data: st.DataObject
) -> None:
    """Whatever stands in config.json: our error or a checkpoint, and nothing large on the way."""
    content = json.loads((whole / "config.json").read_text())
    keys = st.sampled_from([*content, "rope_scaling", "quantization_config", "scoring_func"])
    for key in data.draw(st.lists(keys, min_size=1, max_size=3)):
        content[key] = data.draw(JSON)
    (tmp_path / "config.json").write_text(json.dumps(content))
    if not (tmp_path / "model.safetensors").exists():
        (tmp_path / "model.safetensors").symlink_to(whole / "model.safetensors")
    try:
        assert open_checkpoint(tmp_path).names()
    except CheckpointError:
        pass


def test_a_file_that_is_written_to_while_it_is_mapped(folder: Path, tmp_path: Path) -> None:
    model = Model(open_checkpoint(folder))
    model.forward([1, 2, 3])
    (tmp_path / "model").rename(tmp_path / "moved")  # what is mapped stays
    model.forward([1, 2, 3])
    with (tmp_path / "moved" / "model.safetensors").open("ab") as file:
        file.write(b"more")
    for use in (lambda: model.forward([1]), model.pack, lambda: model.set(quantize="q4_0")):
        with pytest.raises(CheckpointError, match="model.safetensors is not as it was when it was"):
            use()
