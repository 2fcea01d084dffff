"""MLA: both forms give the same numbers, RoPE depends on distances alone, caches are accounted."""

import pytest
import torch

from ktlab.attention.cache import Cache, elements_per_token
from ktlab.attention.rope import RoPE, frequencies, softmax_scale
from ktlab.checkpoint.synthesis import (
    TINY_TEST_CONFIG,
    TINY_V2_CONFIG,
    TINY_YARN_CONFIG,
    synthesize,
)
from ktlab.errors import ContextError, SettingError
from ktlab.model.model import Model


def attend(model: Model, form: str, hidden: torch.Tensor) -> torch.Tensor:
    attention = model.layers[0].attention
    with model.override(attention=form):
        cache = model.new_cache(batch=len(hidden), context=hidden.shape[1])
        return attention.forward(hidden, cache.layers[0], cache.positions(hidden.shape[1]))


@pytest.mark.parametrize(
    "config", [TINY_TEST_CONFIG, TINY_V2_CONFIG, TINY_YARN_CONFIG], ids=lambda c: c.name
)
def test_absorbed_equals_naive(config: object) -> None:
    model = Model(synthesize(config, seed=2))  # type: ignore[arg-type]
    hidden = torch.randn(3, 40, 64, generator=torch.manual_seed(0))
    absorbed, naive = (attend(model, form, hidden) for form in ("absorbed", "naive"))
    torch.testing.assert_close(absorbed, naive, rtol=1e-4, atol=1e-5)


def test_attention_is_causal() -> None:
    model = Model(synthesize(TINY_TEST_CONFIG))
    hidden = torch.randn(1, 20, 64, generator=torch.manual_seed(0))
    changed = hidden.clone()
    changed[:, 12:] += 1.0
    for form in ("absorbed", "naive"):
        before, after = attend(model, form, hidden), attend(model, form, changed)
        assert torch.equal(before[:, :12], after[:, :12])
        assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_rope_scores_depend_on_the_distance_alone() -> None:
    rope = RoPE(TINY_TEST_CONFIG)
    q, k = torch.randn(2, 16, generator=torch.manual_seed(1))

    def score(at: int, seen: int) -> float:
        turned = [rope.rotate(x, *rope.tables(torch.tensor(p))) for x, p in ((q, at), (k, seen))]
        return float(turned[0] @ turned[1])

    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-3)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    yarn = TINY_YARN_CONFIG.yarn
    assert yarn is not None
    ratio = frequencies(TINY_YARN_CONFIG) / frequencies(TINY_TEST_CONFIG)
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(1 / yarn.factor)
    assert (ratio.diff() <= 1e-7).all()
    assert softmax_scale(TINY_YARN_CONFIG) > softmax_scale(TINY_TEST_CONFIG)


def test_cached_numbers_per_token() -> None:
    c = TINY_TEST_CONFIG
    assert elements_per_token(c, "absorbed") == 32 + 16
    assert elements_per_token(c, "naive") == 4 * (32 + 16 + 32)
    cache = Cache(c, ["absorbed", "naive"], batch=2, context=10)
    assert cache.nbytes == 4 * 2 * 10 * (48 + 320)


def test_impossible_caches_and_forms() -> None:
    with pytest.raises(ContextError, match="at least 1"):
        Cache(TINY_TEST_CONFIG, ["naive"], batch=1, context=0)
    with pytest.raises(ContextError, match="context of 513.*has 512"):
        Cache(TINY_TEST_CONFIG, ["naive"], batch=1, context=513)
    with pytest.raises(SettingError, match="expected one of absorbed, naive"):
        Model(synthesize(TINY_TEST_CONFIG)).set(attention="flash")
