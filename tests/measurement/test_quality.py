"""Quality of a change: against closed forms, with a real model, and when things go wrong."""

import math
import threading

import numpy as np
import pytest
import torch

from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.checkpoint.tokenizer import byte_tokenizer
from ktlab.errors import ContextError, KtlabError, SettingError
from ktlab.measurement import windows
from ktlab.measurement.quality import (
    BaselineCache,
    Quality,
    measure_quality,
    stream_quality,
    summarize,
)
from ktlab.measurement.tokens import TokenComparison
from ktlab.measurement.windows import encoded
from ktlab.model.model import Model


def last(stream):
    *_, final = stream
    return final


def test_figures_against_the_definitions(fake):
    """The fake model's distributions depend on the last token only, so all is known exactly."""
    ids = np.random.default_rng(0).integers(32, size=500)
    q = last(stream_quality(fake, ids, a={}, b={"shift": 0.3}))
    p_a = fake.logits(torch.as_tensor(ids[:-1]), {}).double().softmax(-1).numpy()
    p_b = fake.logits(torch.as_tensor(ids[:-1]), {"shift": 0.3}).double().softmax(-1).numpy()
    kl = (p_a * np.log(p_a / p_b)).sum(-1)
    target_a, target_b = (p[np.arange(499), ids[1:]] for p in (p_a, p_b))
    assert q.tokens == q.total_tokens == 499 and q.done
    assert q.kl_mean.value == pytest.approx(kl.mean(), rel=1e-4)
    assert q.kl_median.value == pytest.approx(np.quantile(kl, 0.5, method="inverted_cdf"), rel=1e-4)
    assert q.kl_p99.value == pytest.approx(np.quantile(kl, 0.99, method="inverted_cdf"), rel=1e-4)
    same = p_a.argmax(-1) == p_b.argmax(-1)
    assert q.top1_agreement.value == pytest.approx(100 * same.mean())
    assert q.target_probability_change.value == pytest.approx(
        100 * (target_b - target_a).mean(), abs=1e-5
    )
    ppl_a, ppl_b = (math.exp(-np.log(t).mean()) for t in (target_a, target_b))
    assert q.perplexity_a.value == pytest.approx(ppl_a, rel=1e-5)
    assert q.perplexity_b.value == pytest.approx(ppl_b, rel=1e-5)
    assert q.perplexity_ratio.value == pytest.approx(ppl_b / ppl_a, rel=1e-5)
    assert q.bits_per_byte_a is None, "no tokenizer, no bytes"
    assert q.kl_mean.unit == "nats" and "nats" in q.method


def test_paired_interval_is_narrower_than_the_difference_of_two(fake):
    ids = np.random.default_rng(0).integers(32, size=2000)
    q = last(stream_quality(fake, ids, a={}, b={"shift": 0.02}))
    assert q.perplexity_ratio.half_width * q.perplexity_a.value < 0.2 * q.perplexity_a.half_width


def test_first_answer_is_small_then_it_narrows(fake):
    ids = np.random.default_rng(0).integers(32, size=3000)
    steps = list(stream_quality(fake, ids, a={}, b={"shift": 0.3}))
    assert [q.tokens for q in steps[:3]] == [64, 320, 576]
    assert steps[-1].tokens == 2999 and [q.done for q in steps].count(True) == 1
    assert [length for _, length in fake.log[:2]] == [64, 64]
    widths = [q.kl_mean.half_width for q in steps]
    assert widths[-1] < widths[2] < widths[0]
    assert [q.windows for q in steps] == list(range(1, len(steps) + 1))
    for q in steps:
        assert all(x.low <= x.value <= x.high for x in q.figures.values())


def test_max_tokens_and_several_texts(fake):
    rng = np.random.default_rng(0)
    texts = {"one": rng.integers(32, size=900), "two": rng.integers(32, size=300)}
    steps = list(stream_quality(fake, texts, a={}, b={"shift": 0.3}, max_tokens=1000))
    assert steps[0].tokens == 64
    assert steps[-1].tokens == steps[-1].total_tokens == 500 + 299
    assert "2 texts as strata" in steps[-1].method
    found = measure_quality(fake, texts, a={}, b={"shift": 0.3}, max_tokens=1000)
    assert found is not None
    pooled, each = found
    assert {name: q.tokens for name, q in each.items()} == {"one": 500, "two": 299}
    weighted = (500 * each["one"].kl_mean.value + 299 * each["two"].kl_mean.value) / 799
    assert pooled.kl_mean.value == pytest.approx(weighted, rel=1e-5)
    alone = last(stream_quality(fake, texts["two"], a={}, b={"shift": 0.3}, first=256))
    assert alone.kl_mean.value == pytest.approx(each["two"].kl_mean.value, rel=1e-6)


def test_every_token_is_predicted_once(fake):
    ids = np.random.default_rng(0).integers(32, size=700)
    q = last(stream_quality(fake, ids, a={}, b={}))
    assert (q.per_token.ids_T == ids[1:]).all()


def test_equal_settings_are_exactly_no_change(model, ids):
    for a, b in (({}, {}), ({"top_k": 2}, {"top_k": 2}), ({}, {"top_k": TINY_TEST_CONFIG.top_k})):
        q = last(stream_quality(model, ids, a=a, b=b, max_tokens=200))
        assert q.identical and q.verdict.startswith("no change")
        assert (q.kl_mean.value, q.kl_mean.low, q.kl_mean.high) == (0, 0, 0)
        assert q.kl_p99.value == q.kl_median.value == 0
        assert q.top1_agreement.low == q.top1_agreement.high == 100
        assert q.perplexity_ratio.low == q.perplexity_ratio.high == 1
        assert not any(q.significant(name) for name in q.figures)
        assert q.perplexity_a.low < q.perplexity_a.value < q.perplexity_a.high
        assert "no change" in str(q) and "no change" in q.to_html()


def test_rounding_is_no_change(model, ids):
    """Both MLA forms compute the same function; their difference is rounding."""
    q = last(stream_quality(model, ids, a={}, b={"attention": "naive"}))
    assert not q.identical
    assert 0 < q.kl_mean.value < 1e-9
    assert not q.significant("kl_mean") and not q.significant("perplexity_ratio")
    assert "rounding" in q.verdict


def test_a_real_change_is_significant_and_perplexity_is_right(model, ids):
    q = last(stream_quality(model, ids, a={}, b={"top_k": 1}))
    assert q.significant("kl_mean") and q.significant("top1_agreement")
    losses = []
    starts = [0, 64, 320, 576]
    with model.override(top_k=1):
        for start, stop in zip(starts, [*starts[1:], 599], strict=True):
            window = ids[start:stop].clone()
            if start:
                window[0] = model.tokenizer.bos_id
            logits = model.forward(window)
            losses.append(
                torch.nn.functional.cross_entropy(
                    logits, ids[start + 1 : stop + 1], reduction="none"
                )
            )
    assert q.perplexity_b.value == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-5)


def test_the_users_model_is_not_touched(model, ids):
    with model.override(top_k=2):
        before, logits = model.settings, model.forward(ids[:50])
        stream = stream_quality(model, ids, a={"top_k": 3}, b={"attention": "naive"})
        next(stream)
        assert model.settings == before
        assert torch.equal(model.forward(ids[:50]), logits)
        stream.close()
        assert model.settings == before
        # On top of the model's settings of the moment: b says nothing of k, so it is 2.
        q = last(stream_quality(model, ids, a={}, b={"top_k": 2}, max_tokens=64))
        assert q.identical


def test_baseline_cache_spares_half_the_work(fake):
    ids, cache = np.random.default_rng(0).integers(32, size=1000), BaselineCache()
    fresh = [last(stream_quality(fake, ids, a={}, b={"shift": s})) for s in (0.1, 0.2)]
    fake.log.clear()
    kept = [last(stream_quality(fake, ids, a={}, b={"shift": s}, baseline=cache))
            for s in (0.1, 0.2)]  # fmt: skip
    assert [q.figures for q in kept] == [q.figures for q in fresh]
    assert [s.get("shift") for s, _ in fake.log].count(None) == len(fake.log) // 3
    fake.log.clear()
    last(stream_quality(fake, ids, a={"shift": 0.1}, b={}, baseline=cache))
    assert sum(s.get("shift") == 0.1 for s, _ in fake.log) == 5, "another baseline is computed"


def test_a_large_vocabulary_goes_in_pieces(model, ids, monkeypatch):
    whole = last(stream_quality(model, ids, a={}, b={"top_k": 1}))
    heads, head = [], Model._head

    def watched(model, hidden, probe):
        heads.append(hidden.shape)
        return head(model, hidden, probe)

    monkeypatch.setattr(Model, "_head", watched)
    monkeypatch.setattr(windows, "PIECE_BYTES", 100 * 4 * model.config.vocab_size)
    # Windows of 64, 256, 256 and 22 tokens. Nothing kept; the first and a third of the second, of
    # which a pass makes all; everything.
    for room, made in ((0, 16), (90_000, 15), (1 << 20, 8)):
        cache = BaselineCache(max_bytes=room)
        for _ in range(2):
            heads.clear()
            found = last(stream_quality(model, ids, a={}, b={"top_k": 1}, baseline=cache))
            assert found.tokens == whole.tokens and found.top1_agreement == whole.top1_agreement
            assert found.kl_mean.value == pytest.approx(whole.kl_mean.value, rel=1e-4)
            assert found.perplexity_b.value == pytest.approx(whole.perplexity_b.value, rel=1e-5)
        assert len(heads) == made and max(shape[0] for shape in heads) <= 100


def test_cancel(fake):
    ids, cancel = np.random.default_rng(0).integers(32, size=3000), threading.Event()
    seen = []
    for q in stream_quality(fake, ids, a={}, b={"shift": 1.0}, cancel=cancel):
        seen.append(q)
        if len(seen) == 2:
            cancel.set()
    assert len(seen) == 2 and not seen[-1].done
    assert len(fake.log) == 4, "nothing ran after the cancellation"
    assert list(stream_quality(fake, ids, a={}, b={}, cancel=cancel)) == []
    assert measure_quality(fake, ids, a={}, b={}, cancel=cancel) is None


def test_cancel_between_a_and_b(fake, monkeypatch):
    cancel, forward = threading.Event(), type(fake).forward

    def forward_and_cancel(*arguments):
        cancel.set()
        return forward(*arguments)

    monkeypatch.setattr(type(fake), "forward", forward_and_cancel)
    assert list(stream_quality(fake, [1, 2, 3], a={}, b={"shift": 1}, cancel=cancel)) == []
    assert len(fake.log) == 1


def test_bits_per_byte():
    checkpoint = synthesize(TINY_TEST_CONFIG)
    if checkpoint.tokenizer is None:
        checkpoint.tokenizer = byte_tokenizer(TINY_TEST_CONFIG.vocab_size)
    model = Model(checkpoint)
    q = last(stream_quality(model, "Größe und Maß, 數字. " * 20, a={}, b={"top_k": 1}))
    # One token a byte here, so bits per byte are bits per token.
    assert q.bits_per_byte_a is not None and q.bits_per_byte_change is not None
    assert q.bits_per_byte_a.value == pytest.approx(math.log2(q.perplexity_a.value), rel=1e-5)
    assert q.bits_per_byte_change.value == pytest.approx(
        math.log2(q.perplexity_ratio.value), rel=1e-4
    )


def test_bits_per_byte_of_uneven_tokens():
    rng = np.random.default_rng(0)
    n, nats = 400, rng.exponential(2, 400).astype(np.float32)
    tokens = TokenComparison(
        ids_T=np.zeros(n, np.int64), kl_T=np.zeros(n, np.float32), same_top1_T=np.ones(n, bool),
        logprob_a_T=-nats, logprob_b_T=-nats, bytes_T=rng.integers(1, 9, n),
    )  # fmt: skip
    q = summarize([tokens], total_tokens=n, windows=1, label_a="", label_b="", seconds=0, method="")
    assert q.bits_per_byte_a is not None
    expected = nats.sum() / math.log(2) / tokens.bytes_T.sum()
    assert q.bits_per_byte_a.value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("text", "options", "error", "says"),
    [
        ("", {}, ContextError, "empty"),
        (" \n", {}, ContextError, "empty"),
        ([], {}, ContextError, "0 tokens.*at least 2"),
        ([3], {}, ContextError, "1 tokens.*at least 2"),
        ([[1, 2], [3, 4]], {}, ContextError, "one row"),
        ({}, {}, ContextError, "no text"),
        ({"good": [1, 2, 3], "bad": [1]}, {}, ContextError, "bad has 1 tokens"),
        ([1, 2, 300], {}, ContextError, "300 is outside the vocabulary.*0 to 271"),
        ([1, 2, -1], {}, ContextError, "-1 is outside"),
        ([1, 2, 3], {"window": 513}, ContextError, "513.*1 to 512.*tiny-test"),
        ([1, 2, 3], {"window": 0}, ContextError, "window = 0"),
        ([1, 2, 3], {"max_tokens": 0}, SettingError, "max_tokens = 0"),
        ([1, 2, 3], {"b": {"top_k": 0}}, SettingError, "0"),
        ([1, 2, 3], {"b": {"topk": 3}}, SettingError, "topk"),
    ],
)
def test_bad_input(model, ids, text, options, error, says):
    with pytest.raises(error, match=says):
        next(stream_quality(model, text, **{"a": {}, "b": {}, **options}))
    assert issubclass(error, KtlabError)
    assert next(stream_quality(model, ids, a={}, b={})).identical, "usable afterwards"


def test_encoding_only_what_is_needed(monkeypatch):
    from ktlab.checkpoint.tokenizer import Tokenizer

    checkpoint = synthesize(TINY_TEST_CONFIG)
    checkpoint.tokenizer = byte_tokenizer(TINY_TEST_CONFIG.vocab_size)
    model, text = Model(checkpoint), "äöü and so on. " * 5000
    whole, encode, seen = model.tokenizer.encode(text), Tokenizer.encode, []

    def encode_and_note(self, text, **options):
        seen.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", encode_and_note)
    assert encoded(model, text, limit=100).tolist() == whole[:100]
    assert sum(seen) < 2000


def test_json_and_html(model, ids):
    q = next(stream_quality(model, ids, a={}, b={"top_k": 1}))
    assert Quality.from_json(q.to_json()) == q
    assert math.isinf(q.kl_p99.high), "64 tokens cannot bound a p99, and JSON must hold that"
    bundle = q._repr_mimebundle_()
    assert "top_k=1" in bundle["text/plain"] and "top_k=1" in bundle["text/html"]
    assert "<script" not in bundle["text/html"]


def test_labels_are_escaped(fake):
    q = next(stream_quality(fake, [1, 2, 3], a={}, b={"note": "<b>"}))
    assert "<b>" not in q.to_html() and "&lt;b&gt;" in q.to_html()
