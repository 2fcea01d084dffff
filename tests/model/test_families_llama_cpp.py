"""Files of every family, in float32: llama.cpp writes the same text with the same probabilities."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFValueType

import ktlab
from ktlab.checkpoint import open_checkpoint, write_gguf
from ktlab.checkpoint.config import ModelConfig, YarnScaling
from ktlab.checkpoint.gguf_file import GGUFCheckpoint
from ktlab.checkpoint.synthesis import (
    TINY_OLMOE_CONFIG,
    TINY_QWEN3MOE_CONFIG,
    TINY_TEST_CONFIG,
    TINY_V2_CONFIG,
    TINY_YARN_CONFIG,
    synthesize,
)
from tests.checkpoint.test_forms import fused, old_fields, write_raw
from tests.model.llama import NEEDS_LLAMA_CPP, answers

pytestmark = NEEDS_LLAMA_CPP

CONFIGS = {
    "v3": TINY_TEST_CONFIG,
    "v3 with yarn, beyond its original context": TINY_YARN_CONFIG,
    # DeepSeek-V2's 0.707, which llama.cpp takes for mscale too
    "v3 with yarn of V2": replace(
        TINY_YARN_CONFIG,
        yarn=YarnScaling(factor=40.0, original_context=64, mscale=0.707, mscale_all_dim=0.707),
    ),
    "v3 with tied output": replace(TINY_TEST_CONFIG, tied_output=True),
    # llama.cpp knows a model without q_lora by its 27 layers
    "v2-lite": replace(TINY_V2_CONFIG, num_layers=27),
    "qwen3-moe": TINY_QWEN3MOE_CONFIG,
    "qwen3-moe with yarn": replace(
        TINY_QWEN3MOE_CONFIG, context_length=2048, yarn=YarnScaling(factor=4.0, original_context=64)
    ),
    "olmoe": TINY_OLMOE_CONFIG,
}
FUSED = "v3, keys and values fused"
TOKENS = 24


def prompt(config: ModelConfig) -> list[int]:
    length = 300 if config.yarn else 40
    return torch.randint(0, 256, (length,), generator=torch.manual_seed(1)).tolist()


def write(config: ModelConfig, path: Path) -> Path:
    checkpoint = synthesize(config, seed=11)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    tokenizer = checkpoint.tokenizer
    assert tokenizer is not None
    # llama.cpp wants a merge, and uses none: prompts are ids. Its server keeps back tokens that are
    # no whole UTF-8, so that all are whole here.
    tokenizer.tokens[128:256] = [f"<{byte}>" for byte in range(128, 256)]
    tokenizer.tokens[258], tokenizer.types[258], tokenizer.merges = "ab", 1, [("a", "b")]
    return write_gguf(path, config, tensors, tokenizer)


def as_before_absorption(path: Path) -> Path:
    """The same model with attn_kv_b and the keys of that time."""
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, GGUFCheckpoint)
    fields = old_fields(checkpoint)
    for key, value in checkpoint.metadata.items():
        if key.startswith("tokenizer."):
            kind = GGUFValueType.UINT32 if key.endswith("_id") else GGUFValueType.get_type(value)
            fields[key] = (value, kind)
    return write_raw(path.with_stem("fused"), fields, fused(checkpoint))


@pytest.fixture(scope="module")
def completions(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("families")
    paths = {
        name: write(config, folder / f"{place}.gguf")
        for place, (name, config) in enumerate(CONFIGS.items())
    }
    paths[FUSED] = as_before_absorption(paths["v3"])
    jobs = {path: [prompt(CONFIGS.get(name, TINY_TEST_CONFIG))] for name, path in paths.items()}
    found = answers(jobs, tokens=TOKENS, probs=272, exact=True)
    return dict(zip(paths, zip(paths.values(), found, strict=True), strict=True))


@pytest.mark.parametrize("name", [*CONFIGS, FUSED])
def test_greedy_text_and_probabilities(
    name: str, completions: dict[str, tuple[Path, dict[str, Any]]]
) -> None:
    path, answer = completions[name]
    model, ids = ktlab.load(path), prompt(CONFIGS.get(name, TINY_TEST_CONFIG))
    steps = answer["choices"][0]["logprobs"]["content"]
    written = [step["id"] for step in steps]
    found = [t.id for t in model.stream(ids, max_new_tokens=TOKENS, stop_at_eos=False)]
    assert found == written
    logprobs = model.forward([*ids, *written]).log_softmax(-1)[len(ids) - 1 : -1]
    for place, step in enumerate(steps):
        theirs = {top["id"]: top["logprob"] for top in step["top_logprobs"]}
        assert len(theirs) == 272
        kl = sum(math.exp(theirs[i]) * (theirs[i] - float(logprobs[place, i])) for i in range(272))
        assert abs(kl) < 1e-5, f"token {place}"
