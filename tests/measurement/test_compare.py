"""compare and sweep: what they hold, write and read back."""

import itertools
import json
import random
import threading

import pytest

from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG
from ktlab.errors import KtlabError, SettingError
from ktlab.measurement import pace, provenance
from ktlab.measurement.compare import Cancelled, Comparison, compare
from ktlab.measurement.provenance import Provenance
from ktlab.measurement.sweep import Sweep, pareto, sweep
from ktlab.routing.rules import RelativeThreshold


@pytest.fixture(scope="module")
def comparison(model, ids, known_ceilings):
    texts = {"first": ids[:300], "second": ids[300:]}
    rule = RelativeThreshold(0.5, k_max=4)
    return compare(model, texts, a={}, b={"rule": rule}, window=100, max_tokens=400, repeats=1)


def test_what_a_comparison_holds(comparison, model):
    assert comparison.quality.tokens == 400 and set(comparison.domains) == {"first", "second"}
    assert comparison.speed is not None and set(comparison.speed.speeds) == {"a", "b"}
    assert comparison.a["rules"] == "k = 4" and "0.5" in str(comparison.b["rules"])
    assert comparison.provenance.model == model.name and comparison.provenance.seed == 0
    text = " ".join(str(comparison).split())  # wherever lines end
    for part in ("RelativeThreshold", "first", "prefill", "decode", "torch 2"):
        assert part in text
    assert "RelativeThreshold" in comparison.to_html()


def test_comparison_survives_json(comparison):
    text = comparison.to_json()
    assert Comparison.from_json(text) == comparison
    assert json.loads(text)["quality"]["kl_mean"]["unit"] == "nats"


def test_frame(comparison):
    frame = comparison.to_frame()
    assert {"domain", "figure", "value", "low", "high", "level", "unit", "significant"} <= set(
        frame
    )
    row = frame[(frame.domain == "all") & (frame.figure == "kl_mean")].iloc[0]
    assert row.value == comparison.quality.kl_mean.value and bool(row.significant)
    assert len(frame[frame.figure == "kl_mean"]) == 3
    assert set(frame[frame.domain == "speed"].figure) >= {"prefill_a", "decode_ratio_b"}


def test_without_speed_and_with_progress(model, ids):
    seen = []
    found = compare(
        model, ids, a={}, b={"top_k": 1}, speed=False, max_tokens=300, window=100,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert found.speed is None and found.domains == {}
    assert seen == [(100, 300), (200, 300), (300, 300)]


def test_cancelled(model, ids):
    cancel = threading.Event()
    found = compare(
        model, ids, a={}, b={"top_k": 1}, window=100, cancel=cancel,
        progress=lambda done, total: cancel.set(),
    )  # fmt: skip
    assert found.quality.tokens == 100 and not found.quality.done and found.speed is None
    with pytest.raises(Cancelled, match="before its first window"):
        compare(model, ids, a={}, b={}, cancel=cancel)
    assert issubclass(Cancelled, KtlabError)


def test_sweep(model, ids, known_ceilings):
    before = model.settings
    settings = [{"top_k": k} for k in (1, 2, 4)]
    found = sweep(model, ids, settings, max_tokens=200, window=100, repeats=1)
    assert model.settings == before
    assert [row.label for row in found] == ["top_k=1", "top_k=2", "top_k=4"]
    kl = [row.quality.kl_mean.value for row in found]
    assert kl[0] > kl[1] > kl[2] == 0 and found[2].quality.identical
    assert [row.bytes_per_token for row in found] == sorted(row.bytes_per_token for row in found)
    assert found[2].front, "the baseline loses nothing"
    assert all(row.speed is not None for row in found)
    frame = found.to_frame()
    assert list(frame["settings"]) == [row.label for row in found]
    assert {"kl_mean", "kl_mean_low", "decode_tokens_per_s", "front"} <= set(frame)
    assert Sweep.from_json(found.to_json()) == found
    assert "top_k=2" in str(found) and "top_k=2" in found._repr_mimebundle_()["text/html"]


def test_sweep_without_speed_trades_against_bytes(model, ids):
    found = sweep(
        model, ids, [{"top_k": 4}, {"top_k": 2}, {"top_k": 2, "attention": "naive"}],
        max_tokens=100, window=100, speed=False, baseline={"top_k": 4},
    )  # fmt: skip
    assert found.axis == "bytes a token"
    assert "a token reads" in str(found) and "decode" not in str(found).splitlines()[1]
    # Naive attention gives the same quality (but for rounding) and moves more bytes.
    assert [row.front for row in found] == [True, True, False] or found[2].quality.kl_mean.value < (
        found[1].quality.kl_mean.value
    )


def test_sweep_cancelled_keeps_complete_rows(model, ids):
    cancel = threading.Event()
    cancel.set()
    found = sweep(model, ids, [{"top_k": 1}], cancel=cancel)
    assert len(found) == 0 and "Sweep" in str(found)
    with pytest.raises(SettingError, match="no settings"):
        sweep(model, ids, [])


def test_a_slow_model_reads_what_fits_in_the_seconds(model, ids, monkeypatch, capsys):
    slow = pace.Pace(token_s=0.4, pass_s=4.0, tokens=64)  # 16 tokens a second
    monkeypatch.setattr(pace, "pace", lambda _: slow)
    seen = []
    found = sweep(
        model, ids, [{"top_k": 2}, {"top_k": 1}], max_tokens=300, window=100, speed=False,
        seconds=27, progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert [row.quality.tokens for row in found] == [144, 144]  # 27 / 3 passes * 16
    assert "on 144 tokens" in str(found)
    assert seen == [(100, 288), (144, 288), (244, 288), (288, 288)]
    compared = compare(model, ids, a={}, b={"top_k": 1}, speed=False, seconds=1, max_tokens=300)
    assert compared.quality.tokens == pace.LEAST_TOKENS, "less says nothing"
    assert not any(capsys.readouterr()), "pytest is neither a terminal nor a notebook"


def test_pareto_against_the_definition():
    draw = random.Random(0)
    for _ in range(50):
        points = [(draw.randint(0, 5), draw.randint(0, 5)) for _ in range(8)]
        found = pareto(points)
        for (i, p), on_front in zip(enumerate(points), found, strict=True):
            beaten = any(
                q[0] <= p[0] and q[1] <= p[1] and (q[0] < p[0] or q[1] < p[1])
                for q in itertools.chain(points[:i], points[i + 1 :])
            )
            assert on_front is not beaten
    assert pareto([]) == []


def test_provenance(monkeypatch):
    found = Provenance.collect(model="tiny", seed=3)
    assert found.versions["torch"].startswith("2") and found.cores >= 1 and found.threads >= 1
    assert Provenance.from_json(found.to_json()) == found
    assert "seed 3" in str(found) and found.date in str(found.to_html())
    monkeypatch.setattr(provenance.subprocess, "run", _no_git)
    provenance.git_revision.cache_clear()
    assert provenance.git_revision() is None
    provenance.git_revision.cache_clear()


def _no_git(*_, **__):
    raise FileNotFoundError("git")


def test_config_is_what_these_tests_assume():
    assert TINY_TEST_CONFIG.top_k == 4
