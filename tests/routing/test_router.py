"""The router against a loop that follows DeepSeek's text, and the selection rules."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ktlab.checkpoint.config import ModelConfig
from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, TINY_V2_CONFIG, TINY_V2_GROUPS_CONFIG
from ktlab.errors import SettingError
from ktlab.kernels.linear import Linear
from ktlab.quantization import QTensor
from ktlab.routing import CumulativeProbability, FixedK, RelativeThreshold, Router

TOKENS = 40


def make_router(config: ModelConfig, seed: int = 0, bias: float = 0.3) -> Router:
    generator = torch.manual_seed(seed)
    weight = torch.randn(config.num_experts, config.hidden_size, generator=generator) / 8
    correction = bias * torch.randn(config.num_experts, generator=generator)
    gate = Linear(QTensor.from_array("gate", weight.numpy()))
    return Router(config, 1, gate, correction if config.gating == "sigmoid" else None)


def make_hidden(config: ModelConfig) -> torch.Tensor:
    return torch.randn(TOKENS, config.hidden_size, generator=torch.manual_seed(5))


def by_hand(router: Router, hidden: np.ndarray) -> tuple[set[int], dict[int, float]]:
    """One token, written out: the selected set and the weights (V3 2.1.2, V2 2.2)."""
    c = router.config
    logits = router.weight_ED.numpy().astype(np.float64) @ hidden.astype(np.float64)
    if c.gating == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    choice = scores + (router.bias_E.numpy() if router.bias_E is not None else 0)
    size = c.num_experts // c.n_group
    groups = []
    for g in range(c.n_group):
        members = sorted(choice[g * size : (g + 1) * size], reverse=True)
        groups.append((sum(members[:2]) if c.gating == "sigmoid" else members[0], g))
    opened = {g for _, g in sorted(groups, reverse=True)[: c.topk_group]}
    allowed = [e for e in range(c.num_experts) if e // size in opened]
    best = sorted(allowed, key=lambda e: -choice[e])[: router.rule.k_max]
    total = sum(scores[e] for e in best) if c.norm_topk_prob else 1.0
    return set(best), {e: scores[e] / total * c.routed_scaling_factor for e in best}


@pytest.mark.parametrize("k", [1, 4, 8])
@pytest.mark.parametrize(
    "config",
    [
        TINY_TEST_CONFIG,
        replace(TINY_TEST_CONFIG, n_group=1, topk_group=1),
        replace(TINY_TEST_CONFIG, norm_topk_prob=False),
        TINY_V2_CONFIG,
        TINY_V2_GROUPS_CONFIG,
    ],
    ids=["v3", "no groups", "not normalised", "v2-lite", "v2"],
)
def test_routing_by_hand(config: ModelConfig, k: int) -> None:
    router, hidden = make_router(config), make_hidden(config)
    router.rule = FixedK(k)
    routing = router.forward(hidden)
    for t in range(TOKENS):
        ids, weights = by_hand(router, hidden[t].numpy())
        assert set(routing.ids_TK[t].tolist()) == ids
        for e, weight in zip(routing.ids_TK[t], routing.weights_TK[t], strict=True):
            assert float(weight) == pytest.approx(weights[int(e)], rel=1e-5)


def test_closed_groups_are_minus_infinity_as_deepseek_defines() -> None:
    """With strongly negative biases a mask of 0 would let closed groups win; -inf does not."""
    config = TINY_TEST_CONFIG
    router, hidden = make_router(config), make_hidden(config)
    assert router.bias_E is not None
    router.bias_E -= 3.0  # every score + bias is below 0
    ids = router.forward(hidden).ids_TK
    scores = router.forward(hidden).scores_TE
    size = config.num_experts // config.n_group
    groups = (ids // size).sort(-1).values
    assert all(len(set(row)) <= config.topk_group for row in groups.tolist())
    # The other definition, spelled out, chooses differently here: the difference is real.
    choice = scores + router.bias_E
    open_TE = router._in_open_groups(choice) > -torch.inf
    with_zeros = choice.masked_fill(~open_TE, 0.0).topk(config.top_k).indices
    assert not torch.equal(with_zeros.sort(-1).values, ids.sort(-1).values)


def test_mask_and_force() -> None:
    router, hidden = make_router(TINY_TEST_CONFIG), make_hidden(TINY_TEST_CONFIG)
    router.mask, router.force = frozenset({0, 5}), (7, 2)
    router.check()
    ids = router.forward(hidden).ids_TK
    assert not torch.isin(ids, torch.tensor([0, 5])).any()
    assert (ids[:, 0] == 7).all() and (ids[:, 1] == 2).all()
    router.mask, router.force = frozenset(), ()
    assert torch.equal(
        router.forward(hidden).ids_TK, make_router(TINY_TEST_CONFIG).forward(hidden).ids_TK
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": FixedK(0)}, "top_k = 0; expected 1 to 8 of 16 experts"),
        ({"rule": FixedK(9)}, r"top_k = 9.*2 of 4 groups.*trained with 4"),
        ({"mask": frozenset({16})}, r"mask names experts \[16\]; this layer has 0 to 15"),
        ({"force": (3, 3)}, "names an expert twice"),
        ({"force": (0, 1, 2, 3, 4)}, "5 forced experts but top_k = 4"),
        ({"mask": frozenset({3}), "force": (3,)}, "both masked and forced"),
        ({"mask": frozenset(range(5))}, "5 masked experts leave fewer than top_k = 4"),
    ],
)
def test_impossible_settings_are_refused(change: dict, message: str) -> None:
    router = make_router(TINY_TEST_CONFIG)
    for name, value in change.items():
        setattr(router, name, value)
    with pytest.raises(SettingError, match=message):
        router.check()


scores_TK = arrays(
    np.float32, (6, 8), elements=st.floats(0.0009765625, 1.0, width=32, allow_nan=False)
)


@given(scores_TK, st.floats(0, 1), st.integers(1, 8))
def test_relative_threshold_by_hand(scores: np.ndarray, t: float, k_min: int) -> None:
    kept = RelativeThreshold(t, k_max=8, k_min=k_min).keep(torch.from_numpy(scores)).numpy()
    for row, flags in zip(scores, kept, strict=True):
        bound = np.float32(t) * row.max()
        for i in range(8):
            assert flags[i] == (i < k_min or row[i] > bound)


@given(scores_TK, st.floats(0.01, 1.0), st.integers(1, 8))
def test_cumulative_probability_reaches_p_with_the_fewest(
    scores: np.ndarray, p: float, k_min: int
) -> None:
    kept = CumulativeProbability(p, k_max=8, k_min=k_min).keep(torch.from_numpy(scores)).numpy()
    for row, flags in zip(scores.astype(np.float64), kept, strict=True):
        ranked = sorted(row, reverse=True)
        shares = np.cumsum(ranked) / row.sum()
        fewest = int(np.searchsorted(shares, p - 2e-6)) + 1
        assert row[flags].sum() / row.sum() >= p - 1e-4
        assert flags[:k_min].all()
        assert flags.sum() <= max(fewest, k_min) + k_min


def test_k_max_bounds_every_rule_and_padding_is_marked() -> None:
    router, hidden = make_router(TINY_TEST_CONFIG), make_hidden(TINY_TEST_CONFIG)
    router.rule = RelativeThreshold(0.9, k_max=6, k_min=2)
    routing = router.forward(hidden)
    assert routing.ids_TK.shape == (TOKENS, 6)
    gone = routing.ids_TK < 0
    assert gone.any() and not gone[:, :2].any()
    assert not routing.weights_TK[gone].any()
    scale = TINY_TEST_CONFIG.routed_scaling_factor
    assert torch.allclose(routing.weights_TK.sum(-1), torch.full((TOKENS,), scale))


@pytest.mark.parametrize(
    "make",
    [
        lambda: RelativeThreshold(1.5),
        lambda: RelativeThreshold(0.2, k_max=2, k_min=3),
        lambda: CumulativeProbability(0.0),
        lambda: CumulativeProbability(0.5, k_max=0),
    ],
)
def test_rules_refuse_impossible_values(make: object) -> None:
    with pytest.raises(SettingError, match="expected"):
        make()  # type: ignore[operator]
