"""The true-size twin: what it measures, says, shares and refuses."""

import threading
from typing import Any

import pytest

from ktlab.errors import SettingError
from ktlab.kernels.request import Request
from ktlab.measurement import twin
from ktlab.measurement.synthetic import get_shape
from ktlab.measurement.twin import Side, measure_twin, plan, stream_twin

SMALL = "256x96x12x4"
QUICK: dict[str, Any] = {"rounds": 2, "prefill_tokens": 8}


def side(k: int = 4, format: str = "q8_0", **words: Any) -> Side:
    return Side(label=f"k={k} {words}", top_k=k, format=format, request=Request(**words))


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    """Ceilings from a small buffer: the tests judge the machinery, not the machine."""
    monkeypatch.setattr(twin, "BUFFER_BYTES", 8 << 20)


def test_both_phases_with_ratio_ceiling_and_error():
    first, last = stream_twin(SMALL, side(4), side(3), **QUICK)
    assert set(first.ratios) == {"decode"} and not first.done
    assert set(last.ratios) == {"decode", "prefill"} and last.done
    for cases, k in ((last.a, 4), (last.b, 3)):
        assert cases["decode"].tokens == 1 and cases["prefill"].tokens == 8
        for case in cases.values():
            assert case.top_k == k and case.median_s > 0 and case.ceiling_share > 0
            assert 0 < case.relative_error < 0.02
    assert last.ratios["decode"].n == 2 and last.ratios["decode"].no_change == 1.0
    assert "synthetic weights, not the tiny model" in str(last)
    assert "12 of its 12 experts" in last.what
    assert "&lt;" not in last._repr_mimebundle_()["text/html"]
    assert twin.Twin.from_dict(last.to_dict()).ratios.keys() == last.ratios.keys()


def test_the_same_setting_twice_is_no_change():
    last = measure_twin(SMALL, side(), side(), **QUICK)
    assert last.ratios["decode"].value == last.ratios["decode"].low == 1.0


@pytest.mark.parametrize(
    "other",
    [
        side(layout="packed"), side(backend="torch"), side(backend="numpy"),
        side(format="q4_0"), side(format="int8_channel", layout="packed"),
    ],
    ids=lambda s: f"{s.format} {s.request}",
)  # fmt: skip
def test_every_switch_is_followed(other):
    last = measure_twin(SMALL, side(), other, **QUICK)
    found = last.b["prefill"]
    wanted = other.request
    assert wanted.layout in ("auto", found.layout) and wanted.backend in ("auto", found.backend)
    assert found.format == other.format and found.relative_error < 0.02


def test_packed_on_both_sides_lets_go_of_the_blocks():
    layers = twin._layers(get_shape(SMALL), side(layout="packed"), side(3, layout="packed"), 0)
    stacks = [layer.contender.bank.stacks for layer in layers]
    assert all(a is b for a, b in zip(*stacks, strict=True)), "packed twice"
    for layer in layers:
        layer.contender.run(1, 1)
    twin._release(layers)
    assert all(stack._tensor is None for stack in stacks[0])
    layers[0].contender.run(1, 1)


def test_as_many_experts_as_fit_and_never_fewer_than_selected():
    lite, nbytes = plan("deepseek-v2-lite", side(6, "q8_0"), side(6, "q8_0"))
    assert lite.experts == twin.MOST_EXPERTS and nbytes <= twin.WEIGHT_BYTES
    big, nbytes = plan("deepseek-v3", side(8, "q8_0"), side(8, "q8_0"))
    assert big.experts == 8 and nbytes <= twin.LARGEST_BYTES
    with pytest.raises(SettingError, match="choose a narrower model"):
        plan("deepseek-v3", side(8, "q8_0"), side(8, "q8_0", backend="torch"))


@pytest.mark.parametrize(
    ("shape", "b", "message"),
    [
        ("deepseek-v9", side(), "unknown shape"),
        (SMALL, side(13), "expected 1 to 12"),
        (SMALL, side(0), "expected 1 to 12"),
        (SMALL, side(format="q9"), "unknown format"),
        (SMALL, side(backend="torch", isa="avx2"), "no such combination"),
    ],
)
def test_what_cannot_be_is_refused(shape, b, message):
    with pytest.raises(SettingError, match=message):
        measure_twin(shape, side(), b, **QUICK)


def test_cancelled_before_and_between():
    cancel = threading.Event()
    cancel.set()
    assert list(stream_twin(SMALL, side(), side(3), cancel=cancel, **QUICK)) == []
    cancel.clear()
    told = []

    def progress(text: str) -> None:
        told.append(text)
        if text.startswith("prefill"):
            cancel.set()

    found = list(stream_twin(SMALL, side(), side(3), cancel=cancel, progress=progress, **QUICK))
    assert len(found) == 1 and not found[0].done
    assert any("round 2 of 2" in text for text in told)


def test_a_slow_prefill_gets_fewer_tokens(monkeypatch):
    monkeypatch.setattr(twin, "PREFILL_S", 0.0)
    last = measure_twin(SMALL, side(), side(3), rounds=1, prefill_tokens=64)
    assert last.a["prefill"].tokens == twin.PROBE_TOKENS
