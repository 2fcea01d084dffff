"""Kernels under the roofline: who takes part, who is left out and why, what is drawn."""

import threading

import pytest

from ktlab.kernels import dispatch
from ktlab.kernels.request import EMULATED, NATIVE_ISAS
from ktlab.measurement import kernel_points, twin
from ktlab.measurement.kernel_points import KernelRoofline, stream_points

SMALL = "256x96x8x4"


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    monkeypatch.setattr(twin, "BUFFER_BYTES", 8 << 20)


@pytest.fixture(scope="module")
def results():
    patch = pytest.MonkeyPatch()
    patch.setattr(twin, "BUFFER_BYTES", 8 << 20)
    found = list(
        stream_points(
            SMALL, "q8_0", tokens=(1, 16), experts=8, rounds=1, peers=("x",), budget_s=600
        )
    )
    patch.undo()
    return found


def test_every_usable_kernel_is_a_point(results):
    first, last = results
    assert not first.done and last.done
    usable = {
        (c.backend, c.isa, c.layout)
        for c in dispatch.candidates(("q8_0",) * 3)
        if not c.reject and c.isa not in EMULATED
    }
    measured = {(c.backend, c.isa, c.layout) for c in last.cases if c.tokens == 1}
    assert measured == usable
    rejected = {
        f"{c.backend} {c.isa}"
        for c in dispatch.candidates(("q8_0",) * 3)
        if c.reject and c.isa not in EMULATED
    }
    assert rejected <= set(last.left_out) and "unknown peer 'x'" in last.left_out["x"]
    for case in last.cases:
        assert case.relative_error < 0.02
        assert last.intensity(case) == pytest.approx(case.gflops / case.gb_s)


def test_what_is_drawn_is_what_was_measured(results):
    last = results[-1]
    fig = last.plot()
    drawn = [t for t in fig.data if t.mode == "lines+markers"]
    assert sum(len(t.x) for t in drawn) == len(last.cases)
    assert {t.text[0] for t in drawn} == {"1 token"}
    said = " ".join(a.text for a in fig.layout.annotations)
    assert "read " in said
    for isa in set(last.rates) & set(NATIVE_ISAS):
        assert isa in said
    assert KernelRoofline.from_dict(last.to_dict()).rows() == last.rows()
    assert "8 of 8 experts" in str(last)


def test_slow_kernels_are_left_out_with_the_time(monkeypatch):
    monkeypatch.setattr(kernel_points, "CALL_S", 0.0)
    monkeypatch.setattr(kernel_points, "BESIDE_FASTEST", 1.0)
    *_, last = stream_points(SMALL, "q8_0", tokens=(1, 8), experts=8, rounds=1, peers=())
    assert sum(c.tokens == 8 for c in last.cases) == 1, "only the fastest goes on"
    assert any("a call would take up to" in why for why in last.left_out.values())


def test_cancelled():
    cancel = threading.Event()
    cancel.set()
    assert not list(stream_points(SMALL, "q8_0", tokens=(1,), experts=8, cancel=cancel))


def test_when_the_time_is_up_the_fastest_go_on():
    *_, last = stream_points(
        SMALL, "q8_0", tokens=(1, 8), experts=8, rounds=1, peers=(), budget_s=0.0
    )
    many = [c for c in last.cases if c.tokens == 8]
    assert 1 <= len(many) <= kernel_points.LEADERS
    assert any("the time was up" in why for why in last.left_out.values())
