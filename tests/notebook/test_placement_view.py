"""The map of notebook 03 without a browser: strategies fill it, clicks change it, all follows."""

import json
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import ktlab
from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.errors import PlacementError, TraceError
from ktlab.model.model import Model
from ktlab.notebook.near import Routes, part_cells
from ktlab.notebook.passages import trace_passages
from ktlab.notebook.placement_view import BY_HAND, SHOWN, PlacementView
from ktlab.placement.machine import Machine, get_machine
from ktlab.placement.strategies import get_strategy

TEXTS = {
    "one": "It was the best of times,\nit was the worst of times,\n" * 8,
    "two": "def f(x):\n    return [y * 2 for y in x]\n" * 8,
}


@pytest.fixture(scope="module")
def tiny() -> Model:
    return ktlab.load("tiny")


@pytest.fixture
def view(tiny: Model) -> Iterator[PlacementView]:
    trace = trace_passages(tiny, TEXTS, count=1, tokens=96)
    made = PlacementView(tiny, trace, context=512)
    assert made.wait(60).error == ""
    yield made
    made.close()


def test_strategy_and_budget_fill_the_map(view: PlacementView) -> None:
    for name, budget in (("static", 96), ("front-loading", 66), ("layer-budget", 30)):
        view.set(name, budget)
        assert view.wait(60).error == "" and view.near_LE.sum() == budget
    view.strategy_choice.value = "frequency"
    view.budget_slider.value = 48
    assert view.wait(60).error == "" and view.near_LE.sum() == 48
    shades = np.array(view.map.data[0].z)
    assert ((shades >= 1) == view.near_LE).all() and (shades < 2).all()


def test_hits_are_of_held_out_text_and_stand_on_the_curve(view: PlacementView) -> None:
    assert view.curves is not None
    expected = view.curves.hit_rate("static", 16)
    assert view.hit_rate.value == pytest.approx(expected.value)
    assert view.plot.data[-1].x[0] == 16 and view.plot.data[-1].y[0] == view.hit_rate.value
    assert [line.name for line in view.plot.data[1:-2:2]] == list(SHOWN)
    assert list(view.plot.data[1].y) == pytest.approx(list(view.curves.curve("static").rate_C))
    view.set("static", 384)
    view.wait(60)
    assert view.hit_rate.value == 1.0 and "if fetched instead" not in view.figures()


def test_a_click_moves_one_expert_or_one_part(view: PlacementView) -> None:
    before = view.near_LE.copy()
    plan_before = view.plan
    view._expert_clicked(None, SimpleNamespace(xs=[5], ys=["3"]), None)
    view.wait(60)
    changed = np.argwhere(view.near_LE != before)
    assert changed.tolist() == [[2, 5]] and view.strategy_choice.value == BY_HAND
    assert view.budget_slider.value == before.sum() + (1 if view.near_LE[2, 5] else -1)
    assert 5 in view.placement.experts(layer=3, device="cuda:0" if view.near_LE[2, 5] else "cpu")
    view._part_clicked(None, SimpleNamespace(xs=["2"], ys=["attention"]), None)
    view._part_clicked(None, SimpleNamespace(xs=["once"], ys=["embedding"]), None)
    view.wait(60)
    placement = view.placement
    assert placement.device("attention", layer=2) == "cpu"
    assert placement.device("cache", layer=2) == "cpu", "follows"
    assert placement.device("embedding") == "cuda:0"
    assert view.plan is not None and plan_before is not None
    assert view.plan["cuda:0"].cache == plan_before["cuda:0"].cache * 6 // 7
    assert view.parts.data[0].z[1][3] == 0.9
    json.dumps([view.parts.data[0].to_plotly_json()["z"]], default=list, allow_nan=False)
    view.budget_slider.value = 12
    view.wait(60)
    assert view.strategy_choice.value == "static", "dragged: the last strategy again"
    for bad in ((0, 1), (3, 64)):
        with pytest.raises(PlacementError, match="expected one of layers"):
            view.move(*bad)
    with pytest.raises(PlacementError, match="cannot be moved here"):
        view.move_part("norms", 1)


def test_bytes_of_the_plan_follow(view: PlacementView) -> None:
    view.set("uniform", 0)
    view.wait(60)
    assert view.plan is not None
    none = view.plan["cuda:0"].needed
    view.set("uniform", 384)
    view.wait(60)
    assert view.plan is not None and view.plan["cuda:0"].needed - none > 384 * 3 * 96 * 256 * 4 / 8
    assert "cuda:0" in view.ledger_html.value and "converted" in view.ledger_html.value


def test_the_predicted_speed_follows_every_part(view: PlacementView) -> None:
    view.set("uniform", 0)
    view.wait(60)
    none = view.predicted["there"].decode_tokens_per_s
    assert "decode, predicted on 2x6454s+4090d" in view.figures()
    view.set("uniform", 384)
    view.wait(60)
    near = view.predicted["there"]
    assert near.decode_tokens_per_s > none and "experts" not in near.times["decode"]
    assert view.figures()["prefill, predicted on 2x6454s+4090d"]
    speeds = [near.decode_tokens_per_s]
    for component, layer in (("attention", 1), ("shared", 2), ("dense", 0), ("output", None)):
        view.move_part(component, layer)
        assert view.wait(60).error == ""
        told = view.predicted["there"]
        speeds.append(told.decode_tokens_per_s)
        assert any(span.lane == "CPU" and span.kind == component
                   for span in told.timelines["decode"].spans)  # fmt: skip
        assert "no published speed" in view.note and component in view.note
    assert len(set(speeds)) == 5
    view.machine_choice.value = "epyc-9654+4090"
    view.wait(60)
    assert view.predicted["there"].machine == "epyc-9654+4090"


def test_held_out_loads_say_how_often_an_expert_on_the_gpu_is_asked(view: PlacementView) -> None:
    """The CPU's time is that of the lookups that are left to it, not of the experts."""
    view.set("uniform", 0)
    view.wait(60)
    everything = view.predicted["there"].times["decode"]["experts"]
    view.set("static", 96)
    view.wait(60)
    left = view.predicted["there"].times["decode"]["experts"] / everything
    assert left == pytest.approx(1 - view.hit_rate.value, abs=0.02)
    assert left < 1 - 96 / 384 - 0.02, "the hot ones are near"


def test_a_placement_on_the_cpu_is_predicted_and_measured_here(
    view: PlacementView, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    here = replace(get_machine("1x6454s+4090d"), name="this")
    monkeypatch.setattr(Machine, "measure", lambda: here)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "here" not in view.predicted
    view.set("uniform", 0)
    parts = [cell for row in part_cells(view.routes.shape) for cell in row if cell is not None]
    view.far = frozenset(parts)
    view.refresh()
    assert view.wait(120).error == ""
    assert view.placement.devices == ("cpu",)
    assert view.predicted["here"].engine == "ktlab" and view.speed is not None
    assert "decode, predicted here" in view.figures() and "decode, measured here" in view.figures()


def test_a_picture_and_what_it_says_without_a_gpu(view: PlacementView) -> None:
    shot = view.snapshot()
    assert "96 of 384 experts" in shot.html and "<script" not in shot.html
    assert len(shot.figures) == 3
    import torch

    if not torch.cuda.is_available():
        assert view.figures()["decode, measured"] == "no GPU here" and view.speed is None


def test_on_a_stand_in_it_is_measured_and_said_so(tiny: Model) -> None:
    trace = trace_passages(tiny, TEXTS, count=1, tokens=64)
    view = PlacementView(tiny, trace, context=256, stand_in={"cuda:0": "cpu"})
    assert view.wait(120).error == "" and view.speed is not None
    assert "decode, stand-in" in view.figures()
    assert tiny.placement is None, "the reader's model is not touched"
    view.close()


def test_a_model_without_a_file_has_hits_but_no_ledger() -> None:
    model = Model(synthesize(TINY_TEST_CONFIG, formats="q8_0"))
    view = PlacementView(model, model.trace(list(range(3, 90))))
    assert view.wait(60).error == "" and view.plan is None
    assert "made in memory" in view.snapshot().html
    view.close()


def test_a_trace_of_another_model_is_refused(tiny: Model) -> None:
    other = Model(synthesize(TINY_TEST_CONFIG)).trace(list(range(9)))
    with pytest.raises(TraceError, match="expected a trace of ktlab tiny"):
        PlacementView(tiny, other)
    routes = Routes.of(tiny, tiny.trace("a text of some words, and then some more of them"))
    with pytest.raises(PlacementError, match="no fixed placement"):
        routes.choose("lru", 6)
    chosen = get_strategy("static").chosen(routes.shape, 6, tiny.trace("some other words again"))
    assert sum(map(len, chosen.values())) == 6
