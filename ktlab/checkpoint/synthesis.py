"""Random checkpoints: real structure, random weights, for tests and for timing.

Weights are scaled so that activations stay near 1 through any number of layers.
"""

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from ktlab.checkpoint.checkpoint import MemoryCheckpoint
from ktlab.checkpoint.config import GQASizes, MLASizes, ModelConfig, YarnScaling
from ktlab.checkpoint.names import Shape, expected_tensors, is_quantizable
from ktlab.checkpoint.tokenizer import byte_tokenizer
from ktlab.quantization import Format, QTensor, fallback_format

TINY_TEST_CONFIG = ModelConfig(
    name="tiny-test",
    vocab_size=272,
    hidden_size=64,
    num_layers=3,
    first_dense_layers=1,
    context_length=512,
    intermediate_size=128,
    num_experts=16,
    num_shared_experts=1,
    top_k=4,
    expert_size=32,
    attention=MLASizes(
        num_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_dim=32, qk_rope_dim=16, v_dim=32
    ),
    rms_eps=1e-6,
    rope_theta=10000.0,
    gating="sigmoid",
    score_correction=True,
    n_group=4,
    topk_group=2,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
)
"""DeepSeek-V3's structure at toy size: sigmoid gate with a bias, expert groups, q_lora."""

TINY_V2_CONFIG = replace(
    TINY_TEST_CONFIG,
    name="tiny-test-v2",
    attention=replace(TINY_TEST_CONFIG.mla, q_lora_rank=0),
    gating="softmax",
    score_correction=False,
    n_group=1,
    topk_group=1,
    norm_topk_prob=False,
    routed_scaling_factor=1.0,
    num_shared_experts=2,
)
"""DeepSeek-V2-Lite's: softmax gate, no groups, queries not compressed, two shared experts."""

TINY_V2_GROUPS_CONFIG = replace(
    TINY_V2_CONFIG,
    name="tiny-test-v2-groups",
    attention=TINY_TEST_CONFIG.attention,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=16.0,
)
"""DeepSeek-V2's (236B): softmax gate with expert groups, q_lora."""

TINY_YARN_CONFIG = replace(
    TINY_TEST_CONFIG,
    name="tiny-test-yarn",
    context_length=2048,
    yarn=YarnScaling(factor=8.0, original_context=256, mscale=1.0, mscale_all_dim=1.0),
)
"""As TINY_TEST_CONFIG with the context extended by YaRN, as DeepSeek-V3 does."""

TINY_QWEN3MOE_CONFIG = ModelConfig(
    name="tiny-test-qwen3moe",
    architecture="qwen3moe",
    vocab_size=272,
    hidden_size=64,
    num_layers=3,
    first_dense_layers=0,
    context_length=512,
    intermediate_size=128,
    num_experts=16,
    num_shared_experts=0,
    top_k=4,
    expert_size=32,
    attention=GQASizes(num_heads=4, num_kv_heads=2, head_dim=32, qk_norm="head"),
    rms_eps=1e-6,
    rope_theta=1e6,
    gating="softmax",
    norm_topk_prob=True,
)
"""Qwen3-MoE's: grouped-query attention, heads wider than hidden / heads, no shared expert."""

TINY_OLMOE_CONFIG = replace(
    TINY_QWEN3MOE_CONFIG,
    name="tiny-test-olmoe",
    architecture="olmoe",
    intermediate_size=32,
    attention=GQASizes(num_heads=4, num_kv_heads=4, head_dim=16, qk_norm="projection"),
    rms_eps=1e-5,
    rope_theta=10000.0,
    norm_topk_prob=False,
)
"""OLMoE's: every head has keys of its own, norms over whole projections, weights as they are."""


def synthesize(
    config: ModelConfig,
    *,
    seed: int = 0,
    formats: str | Format | Mapping[str, str | Format] = "f32",
) -> MemoryCheckpoint:
    """Random weights for `config`.

    `formats` is one format for all matrices, or {glob over tensor names: format} where the first
    match counts and no match means f32. As in llama.cpp, norms, biases and the router's gate stay
    f32, and rows that do not divide into blocks fall back (`fallback_format`).
    The tokenizer is one token a byte, where the vocabulary has room for that.
    """
    generator = np.random.default_rng(seed)
    globs = formats if isinstance(formats, Mapping) else {"*": formats}
    tensors = {}
    for name, shape in expected_tensors(config).items():
        wanted: str | Format = "f32"
        if is_quantizable(name, shape):
            wanted = next((f for glob, f in globs.items() if fnmatchcase(name, glob)), "f32")
        values = random_values(generator, name, shape, fan_in(name, shape))
        tensors[name] = QTensor.from_array(name, values, fallback_format(wanted, shape[-1]))
    tokenizer = byte_tokenizer(config.vocab_size) if config.vocab_size >= 258 else None
    return MemoryCheckpoint(config, tensors, tokenizer)


def random_values(
    generator: np.random.Generator, name: str, shape: Shape, inputs: int
) -> NDArray[np.float32]:
    """Values for a tensor of that name, or a part of it, whose outputs have so many inputs."""
    noise = generator.standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        return 1 + np.float32(0.1) * noise
    if name.endswith("exp_probs_b.bias"):
        return np.float32(0.1) * noise
    return noise / np.float32(np.sqrt(inputs))


def fan_in(name: str, shape: Shape) -> int:
    """How many inputs each output of a matrix sums; 1 for the embedding, whose rows are taken."""
    if name == "token_embd.weight":
        return 1
    # Stored (H, C, N), but it maps C to N: the fan-in is the middle axis.
    return shape[-2] if name.endswith("attn_k_b.weight") else shape[-1]
