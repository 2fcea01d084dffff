"""Budgets in seconds: a slow model reads less, says so, and no small model does."""

import math
import threading

import pytest

from ktlab import html
from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.errors import SettingError
from ktlab.experts.caches import replay
from ktlab.measurement import pace as pace_module
from ktlab.measurement.pace import Pace, pace
from ktlab.model.load import load
from ktlab.model.model import Model
from ktlab.notebook import (
    control_room,
    control_room_engine,
    mla_timing,
    mla_view,
    offload_tables,
    offload_view,
    passages,
    quantization_tables,
    quantization_view,
    requantizing,
    roofline_view,
)
from ktlab.notebook.control_room_phases import Options
from ktlab.notebook.mla_timing import affordable, in_memory
from ktlab.notebook.mla_view import MLAView
from ktlab.notebook.offload_view import OffloadView
from ktlab.notebook.passages import trace_passages
from ktlab.notebook.quantization_view import QuantizationView
from ktlab.notebook.requantizing import some_layers
from ktlab.notebook.roofline_view import beginning, kernel_frame

SLOW = Pace(token_s=0.4, pass_s=4.0, tokens=64)
TEXTS = {
    "one": "It was the best of times,\nit was the worst of times,\n" * 40,
    "two": "def f(x):\n    return [y * 2 for y in x]\n" * 40,
}


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(synthesize(TINY_TEST_CONFIG, formats="q8_0"))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every instrument takes the model for one of 16 tokens a second."""
    for module in (control_room_engine, mla_view, offload_view, passages, quantization_view):
        monkeypatch.setattr(module, "pace", lambda _: SLOW)


def test_the_clock_is_read_once_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    model, now = Model(synthesize(TINY_TEST_CONFIG, formats="q8_0")), [0.0]

    def tick() -> float:
        now[0] += 3.0
        return now[0]

    monkeypatch.setattr(pace_module, "perf_counter", tick)
    monkeypatch.setattr(pace_module, "IDLE_FLOPS", 1.0)
    found = pace(model)
    assert (found.token_s, found.pass_s, found.tokens) == (3.0, 3.0, 64)
    assert pace(model.clone()) is found
    monkeypatch.setattr(pace_module, "IDLE_FLOPS", 2e10)
    busy = pace(Model(synthesize(TINY_TEST_CONFIG, formats="q8_0")))
    assert busy.pass_s < 0.01, "a busy machine is no slow model"


def test_the_embedded_model_is_never_cut_short() -> None:
    cost = load("tiny").cost(64, 64)
    slowest = cost.flop / pace_module.IDLE_FLOPS + cost.bytes / pace_module.IDLE_BYTES_PER_S
    one = load("tiny").cost(1, 1)
    token_s = one.flop / pace_module.IDLE_FLOPS + one.bytes / pace_module.IDLE_BYTES_PER_S
    quick = Pace(token_s=token_s, pass_s=slowest, tokens=64)
    assert Options().within(quick) == Options() and not Options().smaller_than(Options())
    assert quick.read(passages.TRACE_S / 7, 1024) == 1024
    assert quick.read(quantization_view.READ_S, 1024) == 1024
    assert quick.read(offload_view.READ_S, 768) == 768
    assert some_layers(load("tiny")) == ()
    assert len(beginning(load("tiny")).layers) == load("tiny").config.num_layers


def test_sizes_follow_seconds() -> None:
    assert SLOW.read(8, 1000) == 128 and SLOW.read(8, 100) == 100 and SLOW.read(0.01, 9) == 1
    assert SLOW.write(2, 48) == 5 and SLOW.read(math.inf, 7) == 7
    assert SLOW.seconds(1) == 0.4 and SLOW.seconds(64) == 4.0
    small = Options(max_tokens=4096).within(SLOW)
    assert small.max_tokens == 192 and small.speed_decode == 4 and small.stage_repeats == 2
    assert "192 of 4,096 tokens" in small.smaller_than(Options(max_tokens=4096))
    contexts = [128, 256, 512, 1024]
    assert affordable(0.001, contexts, 30) == (contexts, 5)
    assert affordable(1.0, contexts, 30) == (contexts, 2)
    assert affordable(9.0, contexts, 30) == ([128, 1024], 2)


def test_contexts_whose_caches_do_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("tiny")
    shape = model.config.attention.cache_elements
    token = 4 * model.config.num_layers * sum(shape.values())
    monkeypatch.setattr(mla_timing, "CACHE_BYTES", 1000 * token)
    for room, expected in (
        (0, [128, 1000]),
        (None, [128, 1000]),
        (16 * 2000 * token, [128, 1000, 2000]),
    ):
        monkeypatch.setattr(mla_timing, "room", lambda model, room=room: room)
        assert in_memory(model, [128, 1000, 2000, 2001]) == expected
        assert in_memory(model, [9000]) == [9000]


def test_a_trace_is_cut_to_its_seconds_and_says_so(
    model: Model, slow: None, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = trace_passages(model, TEXTS, count=4, tokens=100, seconds=10)
    assert len(trace) == 2 * 2 * 64 and set(trace.domains) == set(TEXTS)
    said = capsys.readouterr().out
    assert "4 passages of 100 tokens from each of 2 texts would take about 50 s" in said
    assert "2 of 64 are traced" in said
    assert len(trace_passages(model, TEXTS, count=1, tokens=64, seconds=math.inf)) == 128
    assert not capsys.readouterr().out
    trace_passages(model, {"mine": TEXTS["one"]}, count=1, tokens=200, seconds=1)
    assert "1 passage of 200 tokens from the text would take about" in capsys.readouterr().out
    frame = offload_tables.touched_frame(model, trace, model.moe_blocks[0].index, [1, 32, 256])
    assert list(frame.index) == [1, 32], "no text of this trace has 256 tokens"


def test_instruments_read_what_fits(
    model: Model, slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mla_view, "MEASURE_S", 1.0)
    view = OffloadView(model, TEXTS)
    assert view.wait(60).error == "" and view.quality is not None
    assert view.quality.total_tokens == 192
    assert view.continuations is not None and len(view.continuations[0].ids) == 12
    view.close()
    mla = MLAView(model, TEXTS)
    assert mla.wait(60).error == "" and mla.agreement is not None
    assert mla.agreement.tokens == 80 and len(mla.points[0]["naive"].seconds) == 2
    mla.close()


def test_the_control_room_says_what_it_left_out(model: Model, slow: None) -> None:
    room = control_room(model, texts=TEXTS, max_tokens=512, repeats=1, twin_rounds=1)
    assert room.wait(60) and room.results is not None and room.results.quality is not None
    assert room.results.quality.total_tokens == 192
    assert room.results.speed is not None and room.results.speed.decode_tokens < 32
    assert "up to 192 of 512 tokens" in room.snapshot().html
    room.close()


def test_experts_of_some_layers_and_what_does_not_fit(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = model.moe_blocks
    each = sum(stack.size for stack in blocks[0].experts.stacks)
    assert some_layers(model, each * len(blocks)) == ()
    assert len(some_layers(model, each * (len(blocks) - 1))) == len(blocks) - 1
    (layer,) = some_layers(model, 1)
    monkeypatch.setattr(quantization_view, "some_layers", lambda _: (layer,))
    view = QuantizationView(model, TEXTS, formats={"experts": "q4_0"})
    assert view.wait(60).error == ""
    (point,) = view.points()
    assert point.label == "experts of 1 layer q4_0" and point.layers == (layer,)
    assert view.overrides({"experts": "q4_0"}) == {"quantize": {layer: "q4_0"}}
    with view.model.override(**view.overrides(view.formats)) as changed:
        assert changed.nbytes == point.nbytes and changed.layers[layer].experts.format == "q4_0"
        others = {b.experts.format for b in changed.moe_blocks if b.index != layer}
        assert others == {"q8_0"}
    view.layers_choice.index = 0
    assert view.wait(60).error == "" and view.points()[0].label == "experts q4_0"

    def refuse(_: Model, formats: object, __: object = None) -> object:
        if "q5_0" in str(formats):
            raise SettingError("no room for q5_0")
        return iter([(1, 1)])

    monkeypatch.setattr(quantization_view, "requantize_all", refuse)
    view.sweep(["q5_0", "q4_1"])
    assert view.wait(60).error == "no room for q5_0"
    assert "experts q4_1" in [point.label for point in view.points()], "the sweep went on"
    view.close()
    assert requantizing.QUICK_WEIGHTS > 0


def test_of_a_large_model_kernels_are_compared_on_its_first_layers(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = beginning(model, 1)
    assert [b.index for b in first.moe_blocks] == [model.moe_blocks[0].index]
    assert len(model.layers) > len(first.layers)
    monkeypatch.setattr("ktlab.notebook.roofline_view.beginning", lambda m: beginning(m, 1))
    settings = {"float32": dict(backend="numpy"), "coarse": dict(quantize="q4_0")}
    frame = kernel_frame(model, settings, [1, 2, 3])
    column = f"logits of the first {len(first.layers)} layers, %"
    assert frame.loc["float32", column] == "0" != frame.loc["coarse", column]
    bank = first.moe_blocks[0].experts
    for stack in (*bank.stacks, *first.output.stacks):
        assert "float32" not in stack.operand_bytes
    assert not bank.kept_formats, "a large model's copies are large"
    asked: list[object] = []
    override = Model.override

    def noted(self: Model, **words: object) -> object:
        asked.append(words)
        return override(self, **words)

    monkeypatch.setattr(Model, "override", noted)
    kernel_frame(model, settings, [1, 2, 3])
    exact, coarse = {"backend": {"experts": "numpy"}}, {"quantize": {"experts": "q4_0"}}
    assert asked == [exact, exact, exact | coarse, coarse], "each against its own format"


def test_of_a_large_model_kernels_are_compared_for_a_while(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"float32": dict(backend="numpy"), "coarse": dict(quantize="q4_0")}
    monkeypatch.setattr(roofline_view, "LARGE_S", -1.0)
    small = kernel_frame(model, settings, [1, 2, 3])
    assert small.loc["coarse", "logits, %"], "a small model is never cut short"
    monkeypatch.setattr(roofline_view, "beginning", lambda m: beginning(m, 1))
    late = kernel_frame(model, settings, [1, 2, 3])
    assert set(late["kernel"]) == {"not measured: -1 s are over"}
    monkeypatch.setattr(roofline_view, "LARGE_S", 60.0)
    forward, calls = Model.forward, [0]

    def interrupted(self: Model, ids: object, **options: object) -> object:
        calls[0] += 1
        if calls[0] == 3:  # after the reference and the first setting
            raise KeyboardInterrupt
        return forward(self, ids, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "forward", interrupted)
    part = kernel_frame(model, settings, [1, 2, 3])
    assert part.loc["float32", "experts' output, %"] == "0"
    assert part.loc["coarse", "kernel"] == "not measured: interrupted"


def test_the_format_that_a_tensor_has_is_no_point_of_its_errors() -> None:
    stored = Model(synthesize(TINY_TEST_CONFIG, formats="q4_0")).moe_blocks[0].experts.gate[0]
    plot = quantization_tables.snr_plot(stored)
    assert "q4_0" not in plot.data[1].customdata and all(map(math.isfinite, plot.data[0].y))
    assert plot.layout.title.text.endswith("against q4_0 as stored")


def test_small_losses_a_mib_are_not_rounded_away(model: Model) -> None:
    assert quantization_tables.spent_frame([], model.nbytes, "q4_0").empty
    view = QuantizationView(model, TEXTS, formats={"experts": "q4_0"})
    assert view.wait(60).error == ""
    frame = quantization_tables.spent_frame(view.points(), 1 << 50, "q4_0")
    assert float(frame.loc["experts", "per MiB saved"]) > 0
    view.close()


def test_an_expert_weighs_what_it_does_on_average(model: Model) -> None:
    mixed = model.clone()
    mixed.set(quantize={mixed.moe_blocks[0].index: "q4_0"})
    trace = trace_passages(mixed, TEXTS, count=1, tokens=64)
    frame = offload_tables.link_frame(mixed, replay(trace), 8, 25e9)
    sizes = [block.experts.expert_bytes for block in mixed.moe_blocks]
    assert min(sizes) < max(sizes)
    assert frame["one expert"].iloc[0] == html.unbroken(html.byte_size(sum(sizes) / len(sizes)))


def test_a_picture_taken_too_early_says_so(model: Model) -> None:
    view, go_on = OffloadView(model, TEXTS), threading.Event()
    view.wait(60)

    def job(_: threading.Event) -> None:
        go_on.wait(30)

    view.submit(job, "measuring")
    assert "still measuring: this is what is known after 0 s" in view.wait(0.01).to_html()
    go_on.set()
    view.close()
