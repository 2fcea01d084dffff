"""Grouped-query attention: a readable reference, its cache, its one form, the same instruments."""

import numpy as np
import pytest
import torch

from ktlab.attention import GQA
from ktlab.attention.cache import Cache
from ktlab.attention.rope import RoPE
from ktlab.checkpoint.config import ModelConfig
from ktlab.checkpoint.synthesis import (
    TINY_OLMOE_CONFIG,
    TINY_QWEN3MOE_CONFIG,
    TINY_TEST_CONFIG,
    synthesize,
)
from ktlab.errors import SettingError, StageError
from ktlab.model.model import Model

FAMILIES = pytest.mark.parametrize(
    "config", [TINY_QWEN3MOE_CONFIG, TINY_OLMOE_CONFIG], ids=lambda c: c.name
)


def reference(model: Model, hidden_TD: np.ndarray) -> np.ndarray:
    """Attention of layer 0 over one text, head by head and token by token, in float64."""
    attention = model.layers[0].attention
    assert isinstance(attention, GQA)
    sizes, w = attention.sizes, attention.weights
    d, shared = sizes.head_dim, sizes.num_heads // sizes.num_kv_heads
    eps = model.config.rms_eps

    def project(name: str, norm: torch.Tensor | None) -> np.ndarray:
        matrix = attention.linears[name].weight.dequantize().astype(np.float64)
        out = hidden_TD @ matrix.T
        if norm is not None and sizes.qk_norm == "projection":
            out = out / np.sqrt((out**2).mean(-1, keepdims=True) + eps) * norm.double().numpy()
        heads = out.reshape(len(out), -1, d)
        if norm is not None and sizes.qk_norm == "head":
            heads = heads / np.sqrt((heads**2).mean(-1, keepdims=True) + eps)
            heads = heads * norm.double().numpy()
        return heads

    def turned(heads: np.ndarray) -> np.ndarray:
        angles = np.arange(len(heads))[:, None] * model.config.rope_theta ** (
            -np.arange(0, d, 2) / d
        )
        turn = np.exp(1j * angles)[:, None]
        out = (heads[..., : d // 2] + 1j * heads[..., d // 2 :]) * turn
        return np.concatenate([out.real, out.imag], axis=-1)

    q, k = turned(project("q", w.q_norm)), turned(project("k", w.k_norm))
    v = project("v", None)
    mixed = np.zeros((len(hidden_TD), sizes.num_heads, d))
    for head in range(sizes.num_heads):
        for token in range(len(hidden_TD)):
            keys = k[: token + 1, head // shared]
            scores = np.exp(keys @ q[token, head] / np.sqrt(d))
            mixed[token, head] = (scores / scores.sum()) @ v[: token + 1, head // shared]
    output = attention.linears["output"].weight.dequantize().astype(np.float64)
    return mixed.reshape(len(hidden_TD), -1) @ output.T


@FAMILIES
def test_against_a_readable_reference(config: ModelConfig) -> None:
    model = Model(synthesize(config, seed=3))
    hidden = torch.randn(1, 19, 64, generator=torch.manual_seed(0))
    cache = model.new_cache(context=19)
    attention = model.layers[0].attention
    whole = [attention.forward(hidden[:, :12], cache.layers[0], torch.arange(12)[None])]
    for token in range(12, 19):  # decoded one by one after a prefill
        at = torch.tensor([[token]])
        whole.append(attention.forward(hidden[:, token : token + 1], cache.layers[0], at))
    expected = reference(model, hidden[0].double().numpy())
    np.testing.assert_allclose(torch.cat(whole, dim=1)[0].numpy(), expected, rtol=1e-4, atol=1e-5)


@FAMILIES
def test_halves_turn_by_the_distance_alone(config: ModelConfig) -> None:
    rope = RoPE(config)
    q, k = torch.randn(2, config.attention.rope_dim, generator=torch.manual_seed(1))

    def score(at: int, seen: int) -> float:
        turns = (rope.places(torch.tensor([[p]])).turns_BTr[0, 0] for p in (at, seen))
        turned = [rope.rotate(x, turn) for x, turn in zip((q, k), turns, strict=True)]
        return float(turned[0] @ turned[1])

    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-3)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-3)


def test_the_cache_holds_the_key_heads() -> None:
    cache = Cache(TINY_QWEN3MOE_CONFIG, ["grouped"] * 3, batch=2, context=10)
    assert cache.layers[0].keys.shape == (2, 2, 10, 32)
    assert cache.nbytes == 3 * 4 * 2 * 10 * 2 * 2 * 32
    attention = Model(synthesize(TINY_QWEN3MOE_CONFIG)).layers[0].attention
    assert attention.cache_bytes_per_token() == 4 * 2 * 2 * 32


@FAMILIES
def test_switches_that_do_not_apply_say_so(config: ModelConfig) -> None:
    model = Model(synthesize(config))
    for form in ("naive", "absorbed"):
        with pytest.raises(SettingError, match=f"{form!r} is none of GQA's; .* but grouped"):
            model.set(attention=form)
    with model.override(attention="grouped", quantize={"attention": "q8_0"}):
        assert "attention" not in str(model.settings)
        assert "q8_0" in model.layers[1].attention._repr_mimebundle_()["text/html"]
    with pytest.raises(StageError, match="has no latent attention: GQA, 4 heads"):
        config.mla  # noqa: B018
    latent = Model(synthesize(TINY_TEST_CONFIG))
    with pytest.raises(SettingError, match="'grouped' is none of MLA's; expected one of absorbed"):
        latent.set(attention="grouped")


@FAMILIES
def test_the_same_instruments(config: ModelConfig) -> None:
    model = Model(synthesize(config, seed=5))
    ids = list(range(40, 60))
    trace = model.trace(ids, names=["layers.*.attention.*", "layers.*.router.*"])
    sizes = config.attention
    assert trace["layers.0.attention.q"].shape == (20, sizes.num_heads, sizes.qk_dim)
    assert trace["layers.2.attention.output"].shape == (20, 64)
    assert trace["layers.2.router.ids"].shape == (20, config.top_k)
    weights = trace["layers.0.router.weights"].sum(-1)
    assert (np.abs(weights - 1) < 1e-5).all() == config.norm_topk_prob
    assert trace.routing.histogram(layer=1).counts_E.sum() == 20 * config.top_k
    with model.override(top_k=2, mask={1: [3]}):
        model.forward(ids)
    text = repr(model)
    stage = " ".join(repr(model.layers[1].attention).split())
    assert "GQA grouped" in text and f"GQA(layer 1: grouped, {str(sizes)[5:]}" in stage
    assert "GQA" in model._repr_mimebundle_()["text/html"]
    assert model.layers[0].shared is None


def test_cost_by_hand() -> None:
    model = Model(synthesize(TINY_QWEN3MOE_CONFIG))
    cost = model.cost(tokens=3, context=10)
    row = next(r for r in cost.rows if r.layer == 1 and r.stage == "attention")
    projections = 2 * 64 * (128 + 64 + 64 + 128)
    pairs = 8 + 9 + 10
    assert row.flop == 3 * projections + pairs * 2 * 4 * (32 + 32)
    assert row.cache_bytes == 4 * 2 * 2 * 32 * (10 + 3)
    assert row.weight_bytes == 4 * 64 * (128 + 64 + 64 + 128)
