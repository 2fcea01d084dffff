"""KL divergence against float64, and the cache of the baseline."""

import threading

import pytest
import torch

from ktlab.measurement import tokens
from ktlab.measurement.tokens import (
    Baseline,
    BaselineCache,
    Prediction,
    TokenComparison,
    divergence,
    window_key,
)


def logits(seed, tokens=40, vocab=300, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(tokens, vocab, generator=generator)


def exact_kl(a, b):
    """The definition in float64."""
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("change", [3.0, 1e-1, 1e-3, 1e-4])
def test_divergence_against_float64(change):
    a = logits(0)
    b = a + change * logits(1, scale=1.0)
    found = divergence(a.log_softmax(-1), b.log_softmax(-1)).double()
    expected = exact_kl(a, b)
    assert (found >= 0).all()
    # Also where the divergence (5e-9 nats) lies under the rounding of the sum of p (log p - log q).
    torch.testing.assert_close(found, expected, rtol=2e-2 if change < 1e-3 else 1e-3, atol=1e-11)


def test_plain_sum_would_drown():
    """Why `divergence` is not the textbook sum: at 5e-9 nats that one has the wrong sign."""
    a = logits(0)
    b = a + 1e-4 * logits(1, scale=1.0)
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    plain = (p.exp() * (p - q)).sum(-1)
    assert (plain < 0).any()


def test_equal_is_exactly_zero_and_extremes_stay_finite():
    p = logits(3).log_softmax(-1)
    assert (divergence(p, p) == 0).all()
    far = (200 * logits(4, scale=1.0)).log_softmax(-1)
    found = divergence(p, far)
    assert torch.isfinite(found).all() and (found > 10).all()
    torch.testing.assert_close(found.double(), exact_kl(p, far), rtol=1e-4, atol=1e-4)


def test_comparison_by_hand():
    a = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]).log()
    b = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]]).log()
    targets = torch.tensor([0, 1])
    found = TokenComparison.of(
        Prediction.of(a, targets), Prediction.of(b, targets), targets.numpy(), targets.numpy()
    )
    assert found.kl_T == pytest.approx([0.25 * 0.6931472, 0], abs=1e-6)
    assert found.same_top1_T.tolist() == [False, True]
    assert found.probability_change_T == pytest.approx([-0.25, 0], abs=1e-6)
    assert found.logprob_a_T == pytest.approx([-0.6931472, -1.6094379])
    both = TokenComparison.join([found, found])
    assert len(both) == 4 and both.ids_T.tolist() == [0, 1, 0, 1]


def prediction(seed=0, tokens=8):
    return Prediction.of(logits(seed, tokens), torch.zeros(tokens, dtype=torch.int64))


def test_cache_returns_what_was_put():
    cache, owner = BaselineCache(), object()
    first, kept = Baseline(owner=owner, settings="k=8"), prediction()
    assert cache.get(first, 1) is None
    cache.put(first, 1, kept, torch.float32)
    found = cache.get(first, 1)
    assert found is not None and torch.equal(found.logprobs_TV, kept.logprobs_TV)
    assert cache.get(Baseline(owner=object(), settings="k=8"), 1) is None, "other weights"
    assert cache.get(Baseline(owner=owner, settings="k=6"), 1) is None, "other settings"
    assert (cache.hits, cache.misses) == (1, 3)
    assert "1 predictions reused" in repr(cache)


def test_cache_is_bounded_and_drops_the_oldest_baseline():
    one = prediction().nbytes
    cache, owner = BaselineCache(max_bytes=3 * one), object()
    old, new = (Baseline(owner=owner, settings=s) for s in ("old", "new"))
    for key in range(2):
        cache.put(old, key, prediction(), torch.float32)
    for key in range(5):
        cache.put(new, key, prediction(key), torch.float32)
        assert cache.nbytes <= cache.max_bytes
    assert cache.get(old, 0) is None
    # A text longer than the cache keeps its beginning: pushing it out would keep nothing.
    assert [cache.get(new, key) is not None for key in range(5)] == [True] * 3 + [False] * 2
    cache.put(new, 0, prediction(), torch.float32)
    assert cache.nbytes == 3 * one
    cache.clear()
    assert cache.nbytes == 0 and cache.get(new, 0) is None


def test_half_precision_moves_the_divergence_by_next_to_nothing():
    cache, baseline = BaselineCache(max_bytes=1), Baseline(owner=logits, settings="")
    assert cache.dtype_for(1000, 300) == torch.float16
    assert BaselineCache().dtype_for(1000, 300) == torch.float32
    assert BaselineCache().dtype_for(100, 100_000) == torch.float16
    cache.max_bytes = 1 << 20
    kept, targets = prediction(5, 40), torch.zeros(40, dtype=torch.int64)
    cache.put(baseline, 0, kept, torch.float16)
    other = Prediction.of(logits(5) + 0.05 * logits(6), targets)
    assert cache.get(baseline, 0) is not None
    exact, rounded = (
        TokenComparison.of(a, other, targets.numpy(), targets.numpy())
        for a in (kept, cache.get(baseline, 0) or kept)
    )
    assert abs(exact.kl_T - rounded.kl_T).max() < 5e-4
    assert abs(exact.kl_T.mean() - rounded.kl_T.mean()) < 3e-6
    assert (exact.logprob_a_T == rounded.logprob_a_T).all(), "targets stay float32"
    assert (exact.same_top1_T == rounded.same_top1_T).all()


def test_cache_under_threads():
    cache, owner = BaselineCache(max_bytes=5 * prediction().nbytes), object()

    def work(name):
        for key in range(50):
            cache.put(Baseline(owner=owner, settings=name), key, prediction(key, 8), torch.float32)
            cache.get(Baseline(owner=owner, settings=name), key)

    threads = [threading.Thread(target=work, args=(str(i % 2),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = sum(p.nbytes for windows in cache._groups.values() for p in windows.values())
    assert cache.nbytes == held <= cache.max_bytes


def test_window_key_is_the_tokens():
    assert window_key(torch.tensor([1, 2])) == window_key(torch.tensor([1, 2]))
    assert window_key(torch.tensor([1, 2])) != window_key(torch.tensor([2, 1]))


def test_a_large_vocabulary_is_compared_piece_by_piece(monkeypatch):
    a, b = (torch.randn(37, 50, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    a, b = a.log_softmax(-1), b.log_softmax(-1)
    whole, rows = divergence(a, b), []
    monkeypatch.setattr(tokens, "CHUNK_BYTES", 10 * 50 * 4)
    one = tokens._divergence

    def counted(a, b):
        rows.append(len(a))
        return one(a, b)

    monkeypatch.setattr(tokens, "_divergence", counted)
    assert torch.allclose(divergence(a, b), whole) and rows == [10, 10, 10, 7]


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_predictions_a_piece_at_a_time_and_in_place(rows, monkeypatch):
    given = logits(5)
    expected, before, targets = given.log_softmax(-1), given.clone(), given.argmin(-1)
    monkeypatch.setattr(tokens, "CHUNK_BYTES", rows * 4 * given.shape[1])
    found = Prediction.of(given, targets)
    assert torch.equal(found.logprobs_TV, expected) and torch.equal(given, before)
    own = Prediction.of(given, targets, own=True)
    assert torch.equal(own.logprobs_TV, expected) and torch.equal(own.target_T, found.target_T)
    assert own.logprobs_TV.data_ptr() == given.data_ptr(), "no second array of a large vocabulary"
