"""The control room without a browser: choices, engine, results, what is shown and what is kept."""

import re
import threading
import time
from dataclasses import replace
from math import inf
from typing import Any

import pytest

from ktlab.checkpoint.synthesis import TINY_QWEN3MOE_CONFIG, TINY_TEST_CONFIG, synthesize
from ktlab.errors import ContextError, SettingError
from ktlab.interval import Interval
from ktlab.kernels.computed import Computed
from ktlab.model.model import Model
from ktlab.notebook import control_room, control_room_controls, control_room_engine
from ktlab.notebook import control_room_plane as plane
from ktlab.notebook.control_room_choice import ALL, OWN, Choice, Library
from ktlab.notebook.control_room_elsewhere import elsewhere, prediction, taken
from ktlab.notebook.control_room_quality import verdict
from ktlab.notebook.control_room_results import Point, points
from ktlab.notebook.control_room_text import generated
from ktlab.placement.prediction_view import about

TEXTS = {
    "prose": "The cat sat on the mat, and the dog looked on. " * 20,
    "code": "def f(x):\n    return x + 1\n\n" * 30,
}
QUICK: dict[str, Any] = {
    "max_tokens": 192, "window": 64, "repeats": 2, "new_tokens": 12, "stage_tokens": 48,
    "stage_steps": 2, "stage_repeats": 3, "preview_tokens": 16,
}  # fmt: skip
WAIT_S = 60


@pytest.fixture(scope="module")
def model():
    return Model(synthesize(TINY_TEST_CONFIG, formats="q8_0"))


@pytest.fixture
def room(model):
    opened = control_room(model, texts=TEXTS, **QUICK)
    yield opened
    opened.close()


def test_everything_is_measured_and_reachable(room, model):
    before = model.settings
    assert room.wait(WAIT_S) and room.phase == "done"
    assert room.results.quality.identical and room.results.is_baseline
    room.set(top_k=3)
    assert room.wait(WAIT_S) and room.message == ""
    results = room.results
    assert results.complete and results.choice.top_k == 3
    assert results.quality.tokens == 192 and results.quality.kl_mean.value > 0
    assert [step.tokens for step in results.history][-1] == 192
    assert results.histogram.after_LE.sum() * 4 == results.histogram.before_LE.sum() * 3
    assert not results.histogram.preliminary
    assert set(results.stages.prefill) == {"before", "after"}
    check_intervals(room)
    assert results.speed_ratio("decode").n == 2
    assert len(results.generations.before) == 12
    assert {point.label for point in room.points} == {"k=3", "k=4"}
    assert room.front and set(room.front) <= set(room.points)
    assert set(room.figures) == {"router", "plane"}
    assert model.settings == before, "the reader's model was changed"


def check_intervals(room) -> None:
    """Time by stage and the router's numbers: each with its interval, on screen and as objects."""
    stages, found = room.results.stages, room.results.histogram
    assert stages.repeats == QUICK["stage_repeats"]
    for phase in ("prefill", "decode"):
        total, ratio = stages.total(phase, "after"), stages.ratio(phase)
        assert total.low < total.value < total.high and ratio.low < ratio.high
        assert str(total) in room.screen.html["stages"].value
        assert f"×{ratio} of the time" in room.screen.html["stages"].value
        parts = stages.runs[phase]["after"]
        assert total.n == len(parts) and total.high == max(sum(run.values()) for run in parts)
    layer = room.state.layer
    entropy, moved = found.entropy("after", layer), found.divergence(layer)
    assert entropy.low < entropy.value < entropy.high <= 4.0
    assert 0 < moved.low < moved.value < moved.high, "divergence has no interval"
    assert found.experts_a_token("after", layer).value == 3
    shown = room.screen.html["router"].value
    assert str(replace(entropy, unit="")) in shown and str(replace(moved, unit="")) in shown


def test_a_model_of_another_family():
    other = Model(synthesize(TINY_QWEN3MOE_CONFIG, formats="q8_0"))
    opened = control_room(other, texts=TEXTS, **QUICK)
    try:
        opened.set(top_k=3)
        assert opened.wait(WAIT_S) and opened.phase == "done" and opened.message == ""
        assert {point.label for point in opened.points} == {"k=3", "k=4"}
        assert opened.results is not None and opened.results.quality is not None
        assert opened.results.quality.kl_mean.value > 0
        with pytest.raises(SettingError, match="'naive' is none of GQA's"):
            opened.set(attention="naive")
    finally:
        opened.close()


def test_the_numbers_are_those_of_compare(room, model):
    from ktlab.measurement.compare import compare

    room.set(top_k=2)
    assert room.wait(WAIT_S)
    a, b = room.state.baseline.overrides(), room.state.choice.overrides()
    found = compare(model, TEXTS["prose"], a=a, b=b, max_tokens=192, window=64, speed=False)
    assert room.results.quality.kl_mean.value == pytest.approx(
        found.quality.kl_mean.value, rel=1e-3
    )


def test_known_results_come_back_at_once(room):
    room.wait(WAIT_S)
    first = room.results
    room.set(top_k=2)
    room.wait(WAIT_S)
    room.set(top_k=4)
    assert room.results is first and room.phase == "done"
    assert 'data-setting="k=4"' in room.screen.html["quality"].value
    assert room.wait(5) and room.results is first
    assert 'data-setting="k=4"' in room.screen.html["text"].value


def test_the_latest_of_many_toggles_wins(room):
    shown = []
    room.screen.html["quality"].observe(lambda change: shown.append(change["new"]), "value")
    for k in (3, 4, 3, 1, 2):
        room.set(top_k=k)
    assert room.wait(WAIT_S)
    assert room.results.choice.top_k == 2 and 'data-setting="k=2"' in shown[-1]
    settled = next(i for i, html in enumerate(shown) if 'data-setting="k=2"' in html)
    assert all('data-setting="k=2"' in html for html in shown[settled:])


def test_stop_keeps_what_is_known_and_resume_goes_on(model):
    room = control_room(model, texts=TEXTS, **{**QUICK, "repeats": 500})
    deadline = time.monotonic() + WAIT_S
    while (room.results is None or room.results.speed is None) and time.monotonic() < deadline:
        time.sleep(0.01)
    room.stop()
    assert room.wait(5) and room.phase == "stopped"
    kept = room.results
    assert kept and kept.quality and kept.quality.done
    assert kept.speed and kept.speed.repeats < 500
    assert f"{kept.speed.repeats} repeats" in room.screen.html["speed"].value
    room.resume()
    assert room.busy and room.results is kept
    room.close()
    assert not room.busy
    with pytest.raises(SettingError, match="closed"):
        room.set(top_k=2)


def test_the_first_number_is_the_pages_alone_for_a_while(room):
    """What computes keeps both cores of a small machine: the page would paint the number late."""
    assert room.wait(WAIT_S)
    seconds: list[float] = []
    room.screen.html["quality"].observe(lambda _: seconds.append(time.monotonic()), "value")
    room.screen.html["router"].observe(lambda _: seconds.append(time.monotonic()), "value")
    room.set(top_k=2)
    assert room.wait(WAIT_S) and len(seconds) > 2
    assert seconds[1] - seconds[0] >= control_room_engine.BREATH_S


def test_a_phase_is_shown_now_and_then_and_whole_when_it_ends(room, monkeypatch):
    assert room.wait(WAIT_S)
    monkeypatch.setattr(control_room_engine, "EVERY_S", WAIT_S)
    shown: list[str] = []
    room.screen.html["text"].observe(lambda change: shown.append(change["new"]), "value")
    room.set(top_k=2)
    assert room.wait(WAIT_S) and room.results.generations.done
    # Emptied, begun, and written: not each few tokens.
    assert len(shown) <= 4 and shown[-1] == generated(room.results)


def test_kernels_are_chosen_when_the_room_is_opened(room, monkeypatch):
    assert room.wait(WAIT_S)

    def choose(product, request):
        raise AssertionError(f"{product} is asked again for {request}")

    monkeypatch.setattr(Computed, "_choose", choose)
    room.set(top_k=3)
    assert room.wait(WAIT_S) and room.phase == "done", room.message


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"top_k": 99}, SettingError, "expected 1 to"),
        ({"top_k": 0}, SettingError, "top_k = 0"),
        ({"top_k": "six"}, SettingError, "whole number"),
        ({"rule": "top-q"}, SettingError, 'did you mean "top-p"'),
        ({"rule": "top-p", "threshold": 2.0}, SettingError, "share of the scores"),
        ({"experts": "q5_5"}, ValueError, "q5_5"),
        ({"experts": "q5_k", "backend": "numba"}, SettingError, "no Numba kernel computes q5_1"),
        ({"attention": "fast"}, SettingError, "fast"),
        ({"own_text": "  "}, ContextError, "own text is empty"),
        ({"own_text": "x"}, ContextError, "expected at least 3"),
        ({"text": "prosa"}, ContextError, 'did you mean "prose"'),
        ({"layer": 0}, SettingError, "no router"),
        ({"colour": 1}, SettingError, "can set top_k"),
    ],
)
def test_bad_input_is_refused_and_the_state_kept(room, changes, error, message):
    before = room.state
    with pytest.raises(error, match=message):
        room.set(**changes)
    assert room.state == before


def test_a_bad_press_is_shown_in_the_room_and_undone(room):
    room.controls.all["backend"].value = "numba"
    room.controls.all["experts"].value = "q5_k"  # which falls back to q5_1 in rows this short
    assert "no Numba kernel" in room.message and "alert" in room.screen.message_html.value
    assert room.controls.all["experts"].value == "as stored"
    room.controls.all["own_text"].value = "x"
    assert "expected at least 3" in room.message
    assert room.controls.all["own_text"].value == "x", "what was typed is gone"
    room.controls.all["quick_k"].value = 3
    assert room.message == "" and room.state.choice.top_k == 3
    assert room.controls.all["top_k"].value == 3


def test_a_press_while_the_room_sets_its_own_controls_is_not_lost(room, monkeypatch):
    """A measurement ends, and its thread sets every control, just as the reader chooses a text."""
    assert room.wait(WAIT_S)
    offers, inside, pressed = control_room_controls.offers, threading.Event(), threading.Event()

    def slow_offers(*args):
        if threading.current_thread() is ending and not pressed.is_set():
            inside.set()
            pressed.wait(WAIT_S)
        return offers(*args)

    def end():
        with room._lock:
            room._publish(room.results, "done")

    monkeypatch.setattr(control_room_controls, "offers", slow_offers)
    text = room.controls.all["text"]
    ending = threading.Thread(target=end)
    pressing = threading.Thread(target=lambda: setattr(text, "value", "code"))
    ending.start()
    assert inside.wait(WAIT_S)
    pressing.start()
    pressing.join(0.2)  # long enough to be at the room's lock
    pressed.set()
    ending.join(WAIT_S)
    pressing.join(WAIT_S)
    assert room.state.text == "code" and text.value == "code"


def test_asking_again_for_what_is_on_its_way_keeps_the_numbers(room):
    room.wait(WAIT_S)
    for _ in range(2):
        room.set(own_text="Some words of my own, long enough to be read and judged.")
        assert "cr-quality" in room.screen.html["quality"].value
    assert room.wait(WAIT_S) and room.results.text == OWN


def test_own_text_all_domains_and_another_baseline(room):
    room.set(own_text="Some words of my own, long enough to be read and judged by the model.")
    assert room.state.text == OWN and room.wait(WAIT_S) and room.results.text == OWN
    room.set(text=ALL, top_k=2)
    assert room.wait(WAIT_S) and room.results.quality.windows >= 4
    room.set(baseline="now")
    assert room.results is None or room.results.is_baseline
    room.set(top_k=4)
    assert room.wait(WAIT_S) and room.results.baseline == Choice(top_k=2)
    assert "against k=2" in room.screen.html["quality"].value


def test_rules_formats_and_forms_have_labels_and_expressions(room):
    room.set(rule="top-p", experts="q4_0", attention="naive")
    assert room.state.choice.threshold == 0.8
    assert room.state.choice.label == "top-p 0.8, k≤4 · q4_0 · naive"
    assert "rule=ktlab.CumulativeProbability(p=0.8" in room.state.choice.expression
    assert room.wait(WAIT_S) and room.message == ""
    found = room.results.histogram
    assert all(found.experts_a_token("after", layer).high <= 4 for layer in found.layers)


def test_static_picture_and_bundle(room):
    room.set(top_k=2)
    room.wait(WAIT_S)
    picture = room.snapshot().html
    assert "<script" not in picture and "http" not in picture.replace("http://www.w3.org", "")
    for part in ("KL divergence", "where the time goes", "everything tried", "<svg", "greedy"):
        assert part in picture
    bundle = room._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "text/html" in bundle and "k=2 against k=4" in bundle["text/plain"]


def test_the_plane_as_a_picture_has_axes_and_intervals():
    def point(*ends: tuple[float, float, float], **rest: Any) -> Point:
        speed, kl = (Interval(value=value, low=low, high=high) for value, low, high in ends)
        return Point(speed=speed, kl=kl, **rest)

    base = point((1, 1, 1), (0, 0, 0), label="k=8", on_front=True, current=False)
    fast = point((1.2, 1.1, 1.3), (0.02, 0.01, 0.03), label="k=6", on_front=True, current=True)
    once = point((1.1, 0, inf), (0.01, 0.01, inf), label="k=7", on_front=False, current=False)
    picture = plane.plane([base, fast, once], "decode")
    for words in ("decode speed, × baseline", "KL divergence, nats", ">0.02<", ">1.1<", "k=7"):
        assert words in picture
    dots = re.findall(r'd="M([\d.]+) ([\d.]+)H([\d.]+)M([\d.]+) ([\d.]+)V([\d.]+)"', picture)
    (_, best, *_), (slow, y, quick, x, near, far), (left, _, right, *_) = [
        tuple(map(float, found)) for found in dots
    ]
    assert slow < x < quick and near < y < far, "the intervals are drawn"
    assert best < near, "up is closer to the baseline"
    assert left == right, "a single repeat has no interval"
    assert "no setting" in plane.plane([], "decode")


def test_the_baseline_is_in_the_plane_before_anything_is_measured():
    base = Choice(top_k=8)
    (point,) = points([], base, "decode", base)
    assert (point.speed.value, point.kl.value, point.label) == (1, 0, "k=8")
    assert point.on_front
    assert points([], base.with_(top_k=6), "decode", base) == (point,), "a press draws nothing anew"
    assert ">k=8<" in plane.plane([point], "decode")


def test_a_rule_is_predicted_with_the_experts_it_took(room, model):
    room.set(rule="top-p")
    room.wait(WAIT_S)
    choice, results = room.state.choice, room.results
    mean = taken(choice, results)
    assert mean is not None and 1 <= mean < choice.top_k
    shown = elsewhere(model, results, choice, "2x6454s+4090d", "deepseek-v3")
    assert f"{round(mean)} experts a token (the rule took {mean:.1f} here)" in shown
    waiting = elsewhere(model, None, choice, "2x6454s+4090d", "deepseek-v3")
    assert "the most that the rule may take" in waiting


def test_the_first_few_tokens_give_no_verdict(room):
    room.set(top_k=2)
    room.wait(WAIT_S)
    sure = room.results
    wide = replace(sure.quality.kl_mean, low=0.0, high=inf)
    few = replace(sure, quality=replace(sure.quality, kl_mean=wide))
    assert "no change" not in verdict(few) and "too few tokens" in verdict(few)
    assert "too few tokens" not in verdict(sure) and "so far" not in verdict(sure)
    half = replace(sure, quality=replace(sure.quality, tokens=64, total_tokens=4096))
    assert verdict(half) == f"so far: {verdict(sure)}"


def test_numbers_say_how_they_were_measured(room):
    room.set(top_k=2)
    room.wait(WAIT_S)
    quality, speed = (room.screen.html[name].value for name in ("quality", "speed"))
    assert "room.results.quality.kl_mean" in quality and "192 tokens" in quality
    assert "a=dict(top_k=4), b=dict(top_k=2)" in quality
    assert "Ceiling" in speed and "room.results.speed_ratio" in speed
    room.set(top_k=4)
    room.wait(5)
    assert "no change" in room.screen.html["quality"].value


def test_text_is_escaped(model):
    opened = control_room(model, texts={"<b>": "<script>alert(1)</script> & more. " * 9}, **QUICK)
    opened.wait(WAIT_S)
    assert "<script>" not in opened.snapshot().html
    opened.close()


def test_library_names_its_texts():
    library = Library(TEXTS)
    assert list(library) == ["prose", "code", ALL, OWN] and len(library) == 4
    assert list(Library({})) == [OWN]


def test_unknown_options_are_named(model):
    with pytest.raises(TypeError, match="max_token"):
        control_room(model, texts=TEXTS, max_token=3)


def test_placement_and_another_machine(room, model):
    assert "placed" not in room.snapshot().html
    room.set(placement="gpu + experts", machine="2x6454s+4090d", twin="off")
    assert room.wait(WAIT_S) and room.phase == "done" and room.message == ""
    assert room.results.choice.label == "k=4 · gpu + experts"
    assert 0 < room.results.quality.kl_mean.value < 0.05 and not room.results.quality.identical
    assert "Preset(name='gpu + experts')" in room.state.choice.expression
    page = room.snapshot().html
    assert "one in 4 of each layer&#x27;s routed experts" in page
    assert "is in no file; choose a true-size twin" in page, "this model has no file"
    shown = elsewhere(model, room.results, room.state.choice, "2x6454s+4090d", "deepseek-v3")
    assert "predicted there" in shown and "measured here" in shown and "waits for" in shown
    found = prediction(model, room.state.choice, "2x6454s+4090d", "deepseek-v3")
    assert f">{about(found.decode_tokens_per_s)}<" in shown and found.top_k == 4
    assert found.engine == "ktransformers-0.2.1" and found.memory["cuda:0"] > 1e9
    none = elsewhere(model, None, room.state.choice, "epyc-9654", "deepseek-v3")
    assert "no prediction: " in none, "there is no such machine"
    with pytest.raises(SettingError, match="no placement is called 'gpus'; did you mean"):
        room.set(placement="gpus")
    with pytest.raises(SettingError, match="machine = '2x6454s'"):
        room.set(machine="2x6454s")
    assert model.placement is None
