"""Speeds under a clock that the test holds, the roofline's arithmetic, and a real run."""

import threading

import pytest

from ktlab.errors import ContextError, KtlabError, SettingError
from ktlab.measurement import roofline, speed
from ktlab.measurement.roofline import Ceilings, measure_machine
from ktlab.measurement.speed import SpeedComparison, measure_speed, stream_speed


@pytest.fixture
def clock(fake, monkeypatch, known_ceilings):
    """Time passes only in the fake model's forward passes."""
    monkeypatch.setattr(speed, "perf_counter", lambda: fake.clock.now)
    return fake.clock


def test_speeds_and_ratio(fake, clock):
    found = measure_speed(
        fake,
        {"a": {"seconds": 0.003}, "b": {"seconds": 0.002}},
        prompt_tokens=100,
        decode_tokens=10,
    )
    assert found is not None and found.done
    a, b = found["a"], found["b"]
    assert a.prefill.tokens_per_s.value == pytest.approx(1000 / 3)
    assert b.decode.tokens_per_s.value == pytest.approx(500)
    assert (b.prefill_ratio.value, b.decode_ratio.value) == pytest.approx((1.5, 1.5))
    assert b.prefill_ratio.changed
    assert (a.prefill_ratio.low, a.prefill_ratio.high) == (1, 1) and not a.prefill_ratio.changed
    assert b.prefill.mad_s == pytest.approx(0, abs=1e-9)
    assert len(b.decode.samples_s) == 6 and found.repeats == 6


def test_alternation_after_a_warm_up(fake, clock):
    measure_speed(fake, {"a": {"k": 1}, "b": {"k": 2}}, prompt_tokens=8, decode_tokens=3, repeats=2)
    prefills = [settings["k"] for settings, tokens in fake.log if tokens == 8]
    assert prefills == [1, 2] + [1, 2] * 2
    assert [t for s, t in fake.log if s["k"] == 1] == [8, 1, 1] + [8, 1, 1, 1] * 2


def test_drift_falls_on_both_alike(fake, clock, monkeypatch):
    """The machine slows down fivefold meanwhile: the paired ratio hardly notices."""
    forward = type(fake).forward

    def slower_and_slower(self, ids, cache=None):
        before = self.clock.now
        result = forward(self, ids, cache)
        self.clock.now = before + (self.clock.now - before) * (1 + self.clock.now / 2)
        return result

    monkeypatch.setattr(type(fake), "forward", slower_and_slower)
    found = measure_speed(
        fake,
        {"a": {"seconds": 0.0012}, "b": {"seconds": 0.0010}},
        prompt_tokens=100, decode_tokens=10, repeats=12,
    )  # fmt: skip
    assert found is not None
    samples = found["a"].prefill.samples_s
    assert max(samples) > 2 * min(samples)
    assert found["b"].prefill_ratio.value == pytest.approx(1.2, rel=0.15)
    assert found["b"].prefill.mad_s > 0


def test_cancel(fake, clock):
    cancel, seen = threading.Event(), []
    for step in stream_speed(fake, {"a": {}}, prompt_tokens=8, decode_tokens=2, cancel=cancel):
        seen.append(step)
        if len(seen) == 2:
            cancel.set()
    assert [step.repeats for step in seen] == [1, 2] and not seen[-1].done
    before = len(fake.log)
    assert measure_speed(fake, {"a": {}}, cancel=cancel) is None
    assert len(fake.log) == before


def test_intervals_say_what_few_repeats_hold(fake, clock):
    steps = list(stream_speed(fake, {"a": {}}, prompt_tokens=8, decode_tokens=2))
    levels = [step["a"].decode.tokens_per_s.level for step in steps]
    assert levels[1:5] == [0.5, 0.75, 0.875, 0.9375] and levels[5] == 0.96875
    assert steps[0]["a"].decode.tokens_per_s.high == float("inf")


@pytest.mark.parametrize(
    ("seconds", "name", "share"),
    [
        (0.002, "compute", 1.0),  # 100 tokens x 2 MFLOP at 1 GFLOP/s take 0.2 s; measured 0.2 s
        (0.008, "compute", 0.25),
        (0.03, "calls", 1 / 15),
    ],
)
def test_bound_of_prefill(fake, clock, seconds, name, share):
    found = measure_speed(
        fake, {"a": {"seconds": seconds}}, prompt_tokens=100, decode_tokens=1, repeats=1
    )
    assert found is not None
    bound = found["a"].prefill.bound
    assert bound.name == name and bound.share == pytest.approx(share)
    assert bound.floor_s == pytest.approx(0.2)
    assert f"bound: {name}" in str(bound)


def test_bound_by_bandwidth_and_the_buffer_that_counts(known_ceilings):
    near = known_ceilings.bound(flop=1e6, nbytes=1e7, working_bytes=5e6, seconds=0.002)
    assert near.name == "compute" and near.floor_s == pytest.approx(1e-3)  # 1e7 B at 1e10 B/s
    far = known_ceilings.bound(flop=1e6, nbytes=1e7, working_bytes=2e8, seconds=0.02)
    assert far.name == "bandwidth" and far.share == pytest.approx(0.5)
    assert known_ceilings.bandwidth_for(10) == 1e10, "smaller than all: the smallest buffer"
    assert known_ceilings.read_bandwidth == 1e9


@pytest.mark.parametrize(
    ("settings", "options", "error", "says"),
    [
        ({}, {}, SettingError, "no settings"),
        ({"a": {}}, {"repeats": 0}, SettingError, "at least 1"),
        ({"a": {}}, {"prompt_tokens": 510, "decode_tokens": 3}, ContextError, "context.*512"),
        ({"a": {"top_k": 99}}, {}, SettingError, "99"),
    ],
)
def test_bad_input(model, settings, options, error, says):
    with pytest.raises(error, match=says):
        measure_speed(model, settings, **options)
    assert issubclass(error, KtlabError)


def test_a_real_model(model, known_ceilings):
    before = model.settings
    found = measure_speed(
        model, {"a": {}, "k = 1": {"top_k": 1}}, prompt_tokens=32, decode_tokens=4, repeats=2,
        text="some text",
    )  # fmt: skip
    assert found is not None and model.settings == before
    assert all(s > 0 for s in found["a"].prefill.samples_s)
    # Fewer experts: a lower floor.
    assert found["k = 1"].decode.bound.floor_s < found["a"].decode.bound.floor_s
    assert SpeedComparison.from_json(found.to_json()) == found
    bundle = found._repr_mimebundle_()
    assert "top_k=1" in bundle["text/plain"] and "alternation" in bundle["text/html"]


def test_this_machine(monkeypatch):
    monkeypatch.setattr(roofline, "_measured", {})
    found = measure_machine()
    assert measure_machine() is found, "kept for the process"
    assert 1e8 < found.gemm_flops < 1e14
    rates = [rate for _, rate in sorted(found.bandwidth.items(), key=lambda item: int(item[0]))]
    assert rates == sorted(rates, reverse=True) and 1e8 < rates[-1] < 1e13
    assert "FLOP/s" in str(found) and Ceilings.from_json(found.to_json()) == found
