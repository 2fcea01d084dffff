"""The live views without a browser: they answer, survive bad input, and leave the model alone."""

from dataclasses import replace

import numpy as np
import pytest

from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.errors import KtlabError
from ktlab.experts.caches import replay
from ktlab.measurement.roofline import measure_machine
from ktlab.model.model import Model
from ktlab.notebook import mla_tables, offload_tables, quantization_tables, router_tables
from ktlab.notebook.excerpts import beginning, excerpt
from ktlab.notebook.generation_view import GenerationView
from ktlab.notebook.instrument import OWN, TextSource, numbers, whole
from ktlab.notebook.mla_timing import (
    agreement,
    cache_bytes,
    exact_agreement,
    measure,
    times_faster,
    work,
)
from ktlab.notebook.mla_view import MLAView
from ktlab.notebook.offload_view import OffloadView
from ktlab.notebook.passages import experts_touched, passages, trace_passages
from ktlab.notebook.quantization_plane import label, label_places
from ktlab.notebook.quantization_view import QuantizationView
from ktlab.notebook.requantizing import kind_errors, planned_bytes, requantize_all, sampled
from ktlab.notebook.router_view import RouterView
from ktlab.quantization import FORMATS, QTensor

TEXTS = {
    "one": "It was the best of times,\nit was the worst of times,\n" * 8,
    "two": "def f(x):\n    return [y * 2 for y in x]\n" * 8,
}


@pytest.fixture(scope="module")
def model():
    return Model(synthesize(TINY_TEST_CONFIG, formats="q8_0"))


@pytest.fixture
def view(request, model):
    made = request.param(model, TEXTS)
    assert made.wait(60).error == ""
    yield made
    made.close()


every_view = pytest.mark.parametrize(
    "view", [RouterView, OffloadView, MLAView, QuantizationView, GenerationView], indirect=True
)


@every_view
def test_answers_and_has_a_static_picture(view, model):
    before = model.settings
    html = view.snapshot().html
    assert view.title.split(":")[0] in html and "<script" not in html
    assert view.figures()
    bundle = view._repr_mimebundle_()
    assert {"text/plain", "text/html", "application/vnd.jupyter.widget-view+json"} <= set(bundle)
    assert model.settings == before


@every_view
def test_bad_input_is_said_and_what_was_shown_stays(view):
    shown = view.figures()
    view.source.set("   ")
    view.wait(60)
    assert "the text is empty" in view.status.value and "kt-error" in view.status.value
    assert "kt-failed" in view.box._dom_classes, "what stands there is of another text"
    assert view.figures().keys() >= {*list(shown)[:1]}
    view.source.set("now a text <b>again</b>, and one that is long enough to be measured")
    assert view.wait(60).error == ""
    assert "kt-error" not in view.status.value and "<b>again" not in view.snapshot().html
    assert "kt-failed" not in view.box._dom_classes


@pytest.mark.parametrize("view", [RouterView], indirect=True)
def test_router_view_follows_layer_and_expert(view):
    view.layer_slider.value = 1
    view.expert_choice.value = 3
    assert view.bars.data[-1].y[3] == pytest.approx(view.trace.routing.histogram(1).relative_E[3])
    assert "expert 3 has" in view.tokens.value
    measured = ("entropy of the load", "as many as", "hottest", "used again at the next token")
    said = [str(view.figures()[name]) for name in measured]
    assert all("±" in words or "[" in words for words in said), said


@pytest.mark.parametrize("view", [OffloadView], indirect=True)
def test_offload_view_masks_what_it_says(view):
    assert view.before is not None and view.after is not None
    assert view.masked and all(view.after.counts_E[e] == 0 for e in view.masked)
    assert view.quality.done and not view.quality.identical
    shown = {trace.name: trace for trace in view.snapshot().figures[0].data}
    gone = {e for e, y in enumerate(shown["taken away"].y) if y}
    assert gone and gone <= set(view.masked)
    assert shown["taken away"].marker.color != shown["whole model"].marker.color
    view.count_slider.value = 0
    assert view.wait(60).quality.identical


@pytest.mark.parametrize("view", [QuantizationView], indirect=True)
def test_one_token_is_too_few_for_a_loss(view):
    view.source.set("x")
    view.wait(60)
    assert "expected at least 3" in view.error


@pytest.mark.parametrize("view", [QuantizationView], indirect=True)
def test_quantization_view_keeps_every_point(view, model):
    view.set({"attention": "q4_0"})
    view.wait(60)
    view.set({})
    view.sweep(["q5_0"])
    view.wait(60)
    assert view.formats == {"experts": "q5_0"}, "the controls say what the numbers are of"
    labels = [point.label for point in view.points()]
    assert sorted(labels) == ["attention q4_0", "experts q4_0", "experts q5_0"]
    for point in view.points():
        with view.model.override(quantize=dict(point.formats)):
            assert view.model.nbytes == point.nbytes
    assert len(view.plane.data[1].x) == 3
    with pytest.raises(KtlabError, match="unknown format"):
        view.set({"experts": "q9"})


def test_both_forms_agree_and_are_timed(model):
    found = agreement(model, list(range(40)))
    assert (
        found.equal or found.rounded
    ) and found.same_top1.low < found.same_top1.value <= found.same_top1.high
    assert found.kl.high >= found.kl.value >= 0
    naive, absorbed = (cache_bytes(model, form, 100) for form in ("naive", "absorbed"))
    assert naive > absorbed
    (point,) = measure(model, tokens=2, contexts=[64], repeats=2)
    assert len(point["naive"].seconds) == 2 and point["naive"].median_s > 0
    faster = times_faster(point)
    assert faster.no_change == 1 and faster.low <= faster.value <= faster.high
    assert (point["absorbed"].flop, point["absorbed"].bytes) == work(model, "absorbed", 2, 64)
    with pytest.raises(KtlabError, match="does not end at"):
        list(measure(model, tokens=8, contexts=[4]))


def test_a_probability_is_one_at_most(model):
    view = GenerationView(model, TEXTS)
    assert view.wait(60).error == ""
    sure = [replace(token, logprob=-3.0 * (i % 20 == 0)) for i, token in enumerate(view.written)]
    view._show("", sure)
    mean = view.figures()["mean probability (geometric)"]
    assert 0 <= mean.low <= mean.value <= mean.high <= 1
    view.close()


def test_rounding_kernels_are_told_from_the_forms(model):
    view = MLAView(model, TEXTS)
    assert view.wait(60).error == ""
    exact = exact_agreement(model, list(range(40)))
    assert exact is not None and exact.equal and not exact.rounded
    apart = replace(exact, rounded=True, relative=0.02, max_difference=0.4)
    view._show_agreement(apart, exact)
    said = view.figures()
    assert said["logits, exact products"].startswith("equal within")
    (here,) = (words for name, words in said.items() if name.startswith("logits, the kernels here"))
    assert "apart by up to 0.4" in here
    view._show_agreement(exact, None)
    assert view.figures()["logits"].startswith("equal within")
    view.close()


def test_sizes_and_errors_of_formats(model):
    formats = {"experts": "q4_k", "attention": "q4_0"}
    planned = planned_bytes(model, formats)
    assert planned < planned_bytes(model, {}) == model.nbytes
    assert [*requantize_all(model, formats)][-1] == (5, 5)
    with model.override(quantize=formats):
        assert model.nbytes == planned
    errors = {(e.kind, e.wanted): e for e in kind_errors(model, ["q8_0", "q4_0"], rows=64)}
    assert errors["gate", "q8_0"].relative_rmse == 0
    assert 0.02 < errors["gate", "q4_0"].relative_rmse < 0.2
    tensor = model.moe_blocks[0].experts.gate
    assert sampled(tensor, 10).shape[1] == tensor.shape[-1]
    assert label({}) == "as loaded" and label(formats) == "experts q4_k, attention q4_0"
    with pytest.raises(KtlabError, match="components"):
        planned_bytes(model, {"expert": "q4_0"})


def test_passages_are_labelled_and_apart(model):
    assert len(passages(TEXTS["one"], 4, 100)) == 4
    assert passages("short", 4, 100) == ["short"]
    trace = trace_passages(model, TEXTS, count=2, tokens=16)
    assert trace.domains == ("one", "two") and len(set(trace.segment_T.tolist())) == 4
    layer = model.moe_blocks[0].index
    coverage = router_tables.coverage_GG(trace, layer, 0.5)
    assert coverage.shape == (2, 2) and ((coverage > 0) & (coverage <= 1)).all()
    one, four = (experts_touched(trace, layer, tokens) for tokens in (1, 4))
    assert one.low == one.value == one.high == model.config.top_k
    assert four.low < four.value < four.high < 4 * model.config.top_k
    with pytest.raises(KtlabError, match="no text in the trace has"):
        experts_touched(trace, layer, 1000)
    with pytest.raises(KtlabError, match="no texts"):
        trace_passages(model, {})


def test_editing_makes_it_the_readers_own_text():
    calls = []
    source = TextSource(TEXTS, lambda: calls.append(source.name))
    source.choice.value = "two"
    source.set("mine")
    source.choice.value = "one"
    assert calls == ["two", OWN, "one"] and source.text.startswith("It was")


def test_what_is_written_has_intervals_and_a_ceiling(model, monkeypatch):
    # What random weights draw differs between processors; the end may be among it.
    monkeypatch.setattr(model.checkpoint.tokenizer, "stop_ids", frozenset())
    view = GenerationView(model, TEXTS, max_new_tokens=96)
    try:
        view.wait(60)
        found = view.figures()
        assert view.error == "" and len(view.written) > 64
        speed, p = found["then, median"], found["mean probability (geometric)"]
        assert speed.low < speed.value < speed.high and speed.unit == "tokens/s"
        assert 0 < p.low < p.value < p.high < 1
        assert "% of the ceiling" in str(found["of this machine's ceiling"])
        assert str(speed) in view.snapshot().html
    finally:
        view.close()


def test_excerpt_and_numbers():
    assert excerpt("a\nb\nc", 100) == "a\nb\nc"
    assert excerpt("0123\n" * 50, 22) == "0123\n" * 3 + "0123"
    assert excerpt("ab cd " * 50, 10).split() == ["cd", "ab", "cd"]
    assert "&lt;b&gt;" in numbers({"x": "<b>"})


def test_beginning_ends_with_a_word():
    assert beginning("one two three", 9) == "one two"
    assert beginning("short ", 20) == "short"
    assert beginning("x" * 30, 10) == "x" * 10


def test_tables_of_the_notebooks(model):
    trace = trace_passages(model, TEXTS, count=1, tokens=64)
    layer = model.moe_blocks[0].index
    assert list(router_tables.hot_set_frame(trace).index) == list(model.config.moe_layers)
    said = router_tables.hot_set_verdict(trace, layer)
    chosen = [line for line in said.splitlines() if "chosen on" in line]
    assert len(chosen) == 3 and all("±" in line and line.endswith(" %") for line in chosen)
    coverage = router_tables.coverage_GG(trace, layer)
    assert router_tables.coverage_plot(coverage, trace.domains).data[0].z.shape == (2, 2)
    mine = model.trace(TEXTS["one"][:64], domain="mine")
    assert set(router_tables.likeness_frame(mine, trace, layer).index) == {"one", "two"}
    touched = offload_tables.touched_frame(model, trace, layer, [1, 4])
    assert touched["experts read"][1] == str(model.config.top_k)
    measured = touched.loc[4, ["experts read", "bytes", "FLOP per byte"]]
    assert all("±" in said or "[" in said for said in measured)
    assert len(offload_tables.static_set_frame(trace, layer, 0.25)) == 2
    link = offload_tables.link_frame(model, replay(trace), 8, 25e9)
    assert "DeepSeek-V3's sizes" in link.index.get_level_values("model")
    moved = link[["moved a token", "tokens/s at most"]].to_numpy().ravel()
    assert all("±" in said or "[" in said for said in moved)
    components = quantization_tables.component_frame(model)
    assert len(components) == 6 and "embedding, norms" in components.index
    assert sum(float(share.rstrip("%")) for share in components["share"]) == pytest.approx(
        100, abs=0.3
    )
    assert len(quantization_tables.formats_frame()) == len(FORMATS)
    plot = quantization_tables.snr_plot(model.moe_blocks[0].experts.gate[0])
    assert "q4_0" in plot.data[1].customdata and "q4_k" not in plot.data[1].customdata  # rows of 64
    assert plot.layout.xaxis.range[0] <= min(plot.data[1].x) - 0.5, "a name beside it is cut"


def test_cache_of_a_token_as_published(model):
    frame = mla_tables.cache_frame(model)
    # DeepSeek-V2-Lite in 16 bits: what absorption is usually quoted with.
    assert frame["naive, bytes"].iloc[1] == "276,480"
    assert frame["absorbed, bytes"].iloc[1] == "31,104"
    work = mla_tables.work_frame(model, measure_machine(), [1], 64)
    assert len(work) == 2


def test_labels_of_crowded_points_go_apart():
    assert label_places([5.0, 9.5, 9.6, 9.7], [1.0, 2.0, 1.5, 0.1], 10.0) == [
        "top right", "top left", "bottom left", "middle left"
    ]  # fmt: skip


def test_names_of_crowded_points_meet_neither_points_nor_each_other() -> None:
    places = [(4.5, 20.0), (4.5, 20.3), (4.5, 21.5), (5.0, 20.4), (5.5, 26.0), (5.5, 26.2)]
    names = ["q4_0", "iq4_nl", "q4_k", "q4_1", "q5_0", "q5_k"]
    sides = quantization_tables.label_sides(places, names)
    assert sides[0] != sides[1] and sides[4] != sides[5]
    line = [(4.51, 27.0), (4.52, 27.0), (5.0, 30.0)]
    assert quantization_tables.label_sides([(4.5, 27.0)], ["q4_k"], line) != ["middle right"]
    assert quantization_tables.crowds([4.5, 5.0, 4.5, 4.5, 5.0]) == [[0, 2, 3]]


def test_names_of_formats_with_the_same_bits_stand_in_one_stack() -> None:
    tensor = QTensor.from_array("w", np.random.default_rng(0).normal(size=(8, 256)), "f32")
    plot = quantization_tables.snr_plot(tensor)
    (stack,) = (note.text.split("<br>") for note in plot.layout.annotations)
    assert {"q4_k", "q4_0", "iq4_nl"} <= set(stack)
    points = plot.data[1]
    assert not {f" {name} " for name in stack} & set(points.text)
    decibels = dict(zip(points.customdata, points.y, strict=True))
    heights = [decibels[name] for name in stack]
    assert heights == sorted(heights, reverse=True)


def test_a_whole_table_cuts_nothing() -> None:
    import pandas as pd

    words = "native avx512_bf16, ggml_blocks, 2 threads, few 12, and more than pandas would show"
    frame = pd.DataFrame({"kernel": [words], "logits": ["0.1 %"]}, index=["<a>"])
    shown = whole(frame.rename_axis("setting"))
    assert words in shown.html and "&lt;a&gt;" in shown.html and ">setting<" in shown.html
    assert words in shown.plain
