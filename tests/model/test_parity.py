"""Logits and generations against transformers on the same float32 weights."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from ktlab.checkpoint.config import GQASizes, ModelConfig, YarnScaling
from ktlab.checkpoint.synthesis import (
    TINY_OLMOE_CONFIG,
    TINY_QWEN3MOE_CONFIG,
    TINY_TEST_CONFIG,
    TINY_V2_CONFIG,
    TINY_V2_GROUPS_CONFIG,
    TINY_YARN_CONFIG,
    synthesize,
)
from ktlab.model.model import Model
from tests.model.peer import transformers_model

CONFIGS = {
    "v3": TINY_TEST_CONFIG,
    "v3 without groups": replace(TINY_TEST_CONFIG, n_group=1, topk_group=1),
    "v3 without q_lora": replace(
        TINY_TEST_CONFIG, attention=replace(TINY_TEST_CONFIG.mla, q_lora_rank=0)
    ),
    "v3 not normalised": replace(TINY_TEST_CONFIG, norm_topk_prob=False),
    "v3 with yarn": TINY_YARN_CONFIG,
    # Both mscales, unequal. With mscale_all_dim = 0 transformers ignores mscale, DeepSeek does not.
    "v3 with yarn, two mscales": replace(
        TINY_YARN_CONFIG,
        yarn=YarnScaling(factor=4.0, original_context=64, mscale=0.7, mscale_all_dim=0.4),
    ),
    "v2 with yarn": replace(TINY_V2_CONFIG, context_length=2048, yarn=TINY_YARN_CONFIG.yarn),
    "v2-lite": TINY_V2_CONFIG,
    "v2 with groups": TINY_V2_GROUPS_CONFIG,
    "v3 with tied output": replace(TINY_TEST_CONFIG, tied_output=True),
    "qwen3-moe": TINY_QWEN3MOE_CONFIG,
    "qwen3-moe with yarn": replace(
        TINY_QWEN3MOE_CONFIG,
        context_length=2048,
        yarn=YarnScaling(factor=4.0, original_context=64),
    ),
    "olmoe": TINY_OLMOE_CONFIG,
    "olmoe, keys shared": replace(
        TINY_OLMOE_CONFIG,
        attention=GQASizes(num_heads=4, num_kv_heads=2, head_dim=16, qk_norm="projection"),
    ),
}
CASES = [(name, form) for name, c in CONFIGS.items() for form in c.attention.cache_elements]
LENGTHS = [(1, 512), (2, 512), (17, 512), (17, 6), (130, 512), (130, 50)]


@cache
def pair(name: str) -> tuple[Model, PreTrainedModel]:
    checkpoint = synthesize(CONFIGS[name], seed=7)
    return Model(checkpoint), transformers_model(checkpoint)


def some_ids(config: ModelConfig, length: int) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (length,), generator=torch.manual_seed(length))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("length", "chunk"), LENGTHS)
@pytest.mark.parametrize(("name", "form"), CASES)
def test_logits(name: str, form: str, length: int, chunk: int) -> None:
    model, peer = pair(name)
    ids = some_ids(model.config, length)
    with torch.no_grad():
        expected = peer(ids[None]).logits[0]
    with model.override(attention=form):
        found = model.forward(ids, chunk=chunk)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert relative(found, expected) < 1e-4
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max() * 10


@pytest.mark.parametrize(("name", "form"), CASES)
def test_greedy_generation_token_for_token(name: str, form: str) -> None:
    model, peer = pair(name)
    ids = some_ids(model.config, 11)
    expected = peer.generate(  # type: ignore[operator]
        ids[None], max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(ids) :]
    with model.override(attention=form):
        found = [t.id for t in model.stream(ids, max_new_tokens=24, stop_at_eos=False)]
    assert found == expected.tolist()


def test_a_batch_of_different_lengths_equals_each_alone() -> None:
    model, peer = pair("v3")
    texts = [some_ids(model.config, n) for n in (9, 4, 15)]
    padded = torch.stack([torch.cat((t, t.new_zeros(15 - len(t)))) for t in texts])
    lengths = [len(t) for t in texts]
    cache_ = model.new_cache(batch=3, context=32)
    first = model.next_logits(padded, cache_, lengths=lengths)
    step = torch.tensor([[5], [6], [7]])
    second = model.forward(step, cache_)
    for i, text in enumerate(texts):
        with torch.no_grad():
            expected = peer(torch.cat((text, step[i]))[None]).logits[0]
        assert relative(first[i], expected[-2]) < 1e-4
        assert relative(second[i, 0], expected[-1]) < 1e-4


def test_the_embedded_model_agrees_too() -> None:
    import ktlab

    model = ktlab.load("tiny")
    ids = model.tokenizer.encode("def quicksort(items):\n    if len(items) < 2:\n")
    with torch.no_grad():
        expected = transformers_model(model.checkpoint)(torch.tensor([ids])).logits[0]
    with model.override(backend="torch"):  # transformers does not round activations to 8 bits
        assert relative(model.forward(ids), expected) < 1e-4
