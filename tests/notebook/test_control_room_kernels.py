"""The control room's four kernel switches and its true-size twin, without a browser."""

import time
from typing import Any

import pytest

from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.errors import SettingError
from ktlab.html import text
from ktlab.kernels import dispatch
from ktlab.kernels.request import EMULATED
from ktlab.measurement import synthetic, twin
from ktlab.model.model import Model
from ktlab.notebook import control_room, control_room_kernels
from ktlab.notebook.control_room_choice import Choice
from ktlab.notebook.control_room_kernels import (
    OFF,
    WORDS,
    kernel_line,
    offers,
    twin_sides,
)
from ktlab.notebook.control_room_twin import twin as twin_html

TEXTS = {"prose": "The cat sat on the mat, and the dog looked on. " * 20}
QUICK: dict[str, Any] = {
    "max_tokens": 64, "window": 32, "repeats": 1, "new_tokens": 4, "stage_tokens": 16,
    "stage_steps": 1, "stage_repeats": 1, "preview_tokens": 8, "twin_rounds": 2, "twin_tokens": 8,
}  # fmt: skip
SMALL = "128x64x12x4"
WAIT_S = 60


@pytest.fixture(scope="module")
def model():
    return Model(synthesize(TINY_TEST_CONFIG, formats="q8_0"))


@pytest.fixture
def room(model, monkeypatch):
    # A real model's widths take seconds: the machinery is the same at small ones.
    monkeypatch.setattr(twin, "BUFFER_BYTES", 8 << 20)
    monkeypatch.setattr("ktlab.notebook.control_room_view.TWINS", (OFF, SMALL, "deepseek-v3"))
    monkeypatch.setattr(control_room_kernels, "shapes", lambda: {SMALL: synthetic.get_shape(SMALL)})
    names = [(OFF, OFF), (SMALL, SMALL), ("deepseek-v3", "deepseek-v3")]
    monkeypatch.setattr("ktlab.notebook.control_room_controls.twin_names", lambda: names)
    opened = control_room(model, texts=TEXTS, **QUICK)
    yield opened
    opened.close()


def test_only_what_is_usable_is_on_offer(model):
    found = offers(model, Choice(top_k=4))
    usable = [c for c in dispatch.candidates(("q8_0",) * 3) if not c.reject]
    for kind, known in WORDS.items():
        values, rejected = found[kind]
        assert values[0] == "auto"
        assert set(values[1:]) == {getattr(c, kind) for c in usable} & set(known)
        assert not set(values) & set(rejected) and all(rejected.values())
    # q5_k falls back to q5_1 in rows this short, which neither C nor Numba compute.
    narrow = offers(model, Choice(top_k=4, experts="q5_k"))
    assert narrow["isa"][0] == ["auto"] and "native" not in narrow["backend"][0]
    assert "q5_1" in narrow["backend"][1]["numba"]


def test_the_chosen_kernel_and_its_reason_are_text(model, room):
    html = kernel_line(model, Choice(top_k=4, layout="packed"))
    chosen = room.kernels.chosen
    assert 'data-layout="packed"' in html and "named (packed)" in html
    assert all(text(verdict.isa) in html for verdict in room.kernels)
    assert text(chosen.reason) in room.screen.html["kernel"].value
    assert text(chosen.reason) in room.snapshot().html


def test_switches_are_live_and_an_older_word_gives_way(room, model):
    room.wait(WAIT_S)
    before = model.settings
    usable = offers(model, room.state.choice)
    isa = next(v for v in reversed(usable["isa"][0]) if v not in EMULATED)
    room.controls.all["layout"].value = "packed"
    room.controls.all["isa"].value = isa
    assert room.state.choice == Choice(top_k=4, layout="packed", isa=isa)
    assert room.wait(WAIT_S) and room.message == ""
    assert room.results.complete and room.results.choice.isa == isa
    assert f"isa='{isa}'" in room.state.choice.expression
    assert room.state.choice.label == f"k=4 · packed · {isa}"
    room.controls.all["backend"].value = "numba"
    assert room.state.choice.isa == "auto" and room.state.choice.layout == "packed"
    assert room.controls.all["isa"].value == "auto"
    room.set(layout="ggml_blocks", backend="numpy")
    assert room.wait(WAIT_S) and room.results.quality.kl_mean.value < 5e-3
    assert room.kernels.chosen.backend == "numpy"
    room.set(backend="torch")
    assert room.state.choice.layout == "auto", "torch computes on a float32 copy"
    assert model.settings == before, "the reader's model was changed"


def test_says_when_weights_are_made_ready_first(room):
    assert room.wait(WAIT_S)
    said: list[str] = []
    room.screen.status_html.observe(lambda change: said.append(change["new"]), "value")
    room.set(top_k=3)
    assert room.wait(WAIT_S) and not any("weights" in line for line in said)
    room.set(experts="q4_0")
    assert "k=3 · q4_0" in said[-1] and "weights made ready, then a first answer" in said[-1]
    assert room.wait(WAIT_S) and room.phase == "done"
    room.set(top_k=4)
    room.set(top_k=3)
    assert "weights" not in said[-1], "they are ready"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"isa": "avx1024"}, "isa 'avx1024' is unknown"),
        ({"layout": "packd"}, 'did you mean "packed"'),
        ({"backend": "torch", "isa": "serial"}, "no such combination"),
        ({"experts": "q5_k", "isa": "serial"}, "no C kernel computes q5_1"),
        ({"twin": "deepseek-v9"}, "expected one of off"),
    ],
)
def test_what_cannot_be_is_refused_and_the_state_kept(room, changes, message):
    before = room.state
    with pytest.raises(SettingError, match=message):
        room.set(**changes)
    assert room.state == before


def test_sides_of_the_twin(model):
    eight = Choice(top_k=4, experts="q4_0", layout="packed", attention="naive")
    a, b = twin_sides(model, Choice(top_k=4), eight)
    assert (a.format, a.request.layout) == ("q8_0", "auto")
    assert (b.format, b.request.layout, b.top_k) == ("q4_0", "packed", 4)
    assert "naive" not in b.label, "the twin has no attention"
    a, b = twin_sides(model, eight, eight)
    assert (a.top_k, b.top_k) == (4, 3) and a.format == b.format, "something to compare"


def test_the_twin_is_measured_under_the_same_switches(room):
    room.wait(WAIT_S)
    assert room.twin is None and "no use for a clock" in room.screen.html["twin"].value
    room.set(twin=SMALL)
    assert room.phase == "twin", "what is known already is measured again"
    assert room.wait(WAIT_S) and room.phase == "done" and room.message == ""
    first = room.twin
    assert first and first.done and (first.label_a, first.label_b) == ("k=4", "k=3")
    shown = room.screen.html["twin"].value
    assert "synthetic weights, not the tiny model" in shown and "of its 12 experts" in shown
    assert "synthetic weights, one layer" in room.screen.html["twin_title"].value
    assert "decode, 1 token a call: k=4 → k=3" in shown and "% of " in shown
    assert "room.twin.ratios" in shown and "synthetic weights" in room.snapshot().html
    room.set(experts="q4_0", layout="packed")
    assert room.wait(WAIT_S)
    assert room.twin is not first and room.twin.b["decode"].format == "q4_0"
    assert room.twin.b["decode"].layout == "packed" and room.twin.a["decode"].format == "q8_0"
    room.set(experts="as stored", layout="auto")
    assert room.phase == "done" and room.twin is first, "known results come back at once"
    room.set(twin=OFF)
    assert room.twin is None and room.phase == "done"


def test_a_twin_that_does_not_fit_says_so_in_its_panel(room, monkeypatch):
    monkeypatch.setattr(twin, "LARGEST_BYTES", 1)
    room.set(twin=SMALL)
    assert room.wait(WAIT_S) and room.phase == "done" and room.message == ""
    assert room.twin is None and "choose a narrower model" in room.screen.html["twin"].value
    assert room.results.complete


def test_stop_ends_the_twin(room):
    room.wait(WAIT_S)
    object.__setattr__(room._engine.options, "twin_rounds", 10_000)
    room.set(twin=SMALL)
    deadline = time.monotonic() + WAIT_S
    while "round" not in room.screen.status_html.value and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "true-size twin, decode" in room.screen.status_html.value
    room.stop()
    assert room.wait(10) and room.phase == "stopped" and room.twin is None


def test_twin_panel_while_waiting_and_failing():
    assert "measured after everything else" in twin_html(None, SMALL)
    assert "round 2" in twin_html(None, SMALL, "decode, round 2 of 6")
    failed = twin_html("<b> is too large", SMALL)
    assert "&lt;b&gt;" in failed and 'role="alert"' in failed
