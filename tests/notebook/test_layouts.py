"""Notebook 06's views: maps of bytes held against the packer, the walk against the product."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.errors import SettingError
from ktlab.interval import Interval
from ktlab.kernels import packing
from ktlab.kernels.request import Request
from ktlab.kernels.switch_measurement import measure_switch
from ktlab.model.model import Model
from ktlab.notebook.byte_drawing import Bytes, drawing
from ktlab.notebook.byte_maps import block_map, drawable, panel_map
from ktlab.notebook.byte_view import DRAWN, BytesView, TileView
from ktlab.notebook.roofline_view import RooflineView, kernel_frame, switch_figure
from ktlab.notebook.tile_walk import FORMATS, INSTRUCTIONS, Walk
from ktlab.quantization import QTensor

RNG = np.random.default_rng(0)
VALUES_NK = RNG.standard_normal((32, 256)).astype(np.float32)


def tensor(format: str) -> QTensor:
    return QTensor.from_array("w", VALUES_NK, format)


@pytest.fixture(scope="module")
def model():
    return Model(synthesize(TINY_TEST_CONFIG, formats="q8_0"))


@pytest.fixture(scope="module")
def wide():
    """A model whose rows hold a whole super-block."""
    from dataclasses import replace

    return Model(synthesize(replace(TINY_TEST_CONFIG, hidden_size=256), formats="q8_0"))


@pytest.mark.parametrize("format", DRAWN)
def test_both_maps_read_the_same_codes(format):
    shown = Bytes.of(tensor(format), row=19)
    codes = np.zeros(256, np.int64)
    for value, byte in zip(shown.block_bytes.tolist(), block_map(format), strict=True):
        for b in byte.holds:
            codes[b.column] |= (value >> b.shift & (1 << b.count) - 1) << b.to
    if format == "q8_0":
        codes ^= 0x80
    assert (codes == shown.codes_RC[3]).all()
    assert not any(b.field == "padding" for b in block_map(format))


@pytest.mark.parametrize("format", ["q4_k", "q6_k", "q5_0"])
def test_changing_a_byte_of_a_block_changes_the_packed_bytes_that_the_map_names(format):
    original = tensor(format)[:16]
    before = packing.pack(packing.blocks(original), Request(threads=1)).expert(0)
    row, at = 5, next(i for i, b in enumerate(block_map(format)) if b.field == "codes") + 7
    blocks = original.blocks.copy()
    blocks[row, at] ^= 0xFF
    changed = QTensor(name="w", format=original.format, shape=original.shape, blocks=blocks)
    after = packing.pack(packing.blocks(changed), Request(threads=1)).expert(0)
    columns = {b.column for b in block_map(format)[at].holds}
    named = {
        i
        for i, byte in enumerate(panel_map(format))
        if byte.field == "codes" and any(b.row == row and b.column in columns for b in byte.holds)
    }
    assert set(np.flatnonzero(before != after)) == named


def test_drawing_marks_the_same_weights_in_both():
    html = drawing(Bytes.of(tensor("q4_k"), row=3), offset=16)
    assert 'data-row="19"' in html and "<script" not in html
    cells = re.findall(r'<i class="([^"]*)"', html)
    for column in (0, 100, 255):
        assert sum(f"w{column}" in c.split() for c in cells) == 2, "once a drawing"
    assert "144 bytes hold 256 columns of row 19" in html
    q6 = drawing(Bytes.of(tensor("q6_k")))
    assert "upper bits of the codes" in q6
    assert sum("w7" in c.split() for c in re.findall(r'<i class="([^"]*)"', q6)) == 4


@pytest.mark.parametrize(
    ("made", "row", "message"),
    [
        (lambda: QTensor.from_array("w", VALUES_NK, "int8_channel"), 0, "no blocks"),
        (lambda: QTensor.from_array("w", VALUES_NK[:8], "q4_0"), 0, "16 x 256 or more"),
        (lambda: QTensor.from_array("w", VALUES_NK, "q4_0"), 32, "row 32"),
    ],
)
def test_what_cannot_be_drawn_is_said(made, row, message):
    with pytest.raises(ValueError, match=message):
        Bytes.of(made(), row)
    assert not drawable("f32") and not drawable("int8_channel")


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_the_walk_ends_at_the_product(format, instruction):
    x_TK = RNG.standard_normal((16, 256))
    walk = Walk.of(tensor(format), x_TK, instruction)
    exact = x_TK @ tensor(format)[:16].dequantize().astype(np.float64).T
    assert np.allclose(walk.exact, exact, rtol=1e-4, atol=1e-4)
    assert 0 < walk.error < 0.01
    last = walk.at(walk.steps - 1)
    part = slice(last.start, 256)
    whole = walk.q_TK[:, part] @ (walk.codes_RK - walk.zero)[:, part].T
    assert (walk.sums(last) == whole).all(), "the last step has all products of its scale"
    assert "put away" in walk.says(walk.steps - 1) and "put away" not in walk.says(0)
    first = walk.sums(walk.at(0))
    line = walk.q_TK[:, :4] @ (walk.codes_RK - walk.zero)[:, :4].T
    tokens = 16 if instruction == "TDPBSUD" else 1
    assert (first[:tokens] == line[:tokens]).all() and not first[tokens:].any()
    a, b, c = walk.figure(walk.steps // 2).data
    assert np.shape(a.z) == (16, 64) and np.shape(b.z) == (16, 64) and np.shape(c.z) == (16, 16)


def test_the_walk_refuses_what_it_does_not_know():
    x_TK = np.zeros((16, 256))
    with pytest.raises(SettingError, match="expected one of TDPBSUD"):
        Walk.of(tensor("q4_0"), x_TK, "TDPBUUD")
    with pytest.raises(SettingError, match="expected one of int8_channel"):
        Walk.of(tensor("iq4_nl"), x_TK, "TDPBSUD")
    with pytest.raises(SettingError, match="step 64"):
        Walk.of(tensor("q4_0"), x_TK, "TDPBSUD").at(64)


def test_bytes_view_follows_format_and_row(wide):
    view = BytesView(wide)
    assert view.wait(60).error == "" and view.shown and view.shown.format == "q4_k"
    view.format_choice.value = "q6_k"
    view.row_slider.value = 1
    view.wait(60)
    assert view.shown and view.shown.format == "q6_k" and 'data-row="1"' in view.picture.value
    assert "bits a weight in blocks" in view.status.value
    html = view.snapshot().html
    assert "<script" not in html and view.title in html
    view.close()


def test_tile_view_steps(wide):
    view = TileView(wide)
    view.step_slider.value = 20
    before = view.summary.value
    view.step_slider.value = 21
    assert view.summary.value != before and "line" in view.note
    view.instruction.value = "VPDPBUSD"
    assert view.step_slider.max == 1023 and "VPDPBUSD" in view.status.value
    view.step_slider.value = 1000
    view.instruction.value = "TDPBSUD"
    assert view.step_slider.value == 63 and view.walk and view.walk.instruction == "TDPBSUD"
    assert len(view.snapshot().figures) == 1
    view.close()


def test_roofline_view_fills_up(model, monkeypatch):
    from ktlab.measurement import kernel_points, twin

    monkeypatch.setattr(twin, "BUFFER_BYTES", 8 << 20)
    monkeypatch.setattr(kernel_points, "WEIGHT_BYTES", 1 << 20)
    monkeypatch.setattr("ktlab.notebook.roofline_view.SHAPES", ("256x96x8x4", "nonsense"))
    view = RooflineView(model, tokens=(1, 4), rounds=1, peers=(), budget_s=600)
    assert view.wait(120).error == "" and view.result and view.result.done
    shown = [t for t in view.chart.data if t.visible and t.mode == "lines+markers"]
    assert sum(len(t.x) for t in shown) == len(view.result.cases)
    assert set(view.figures()) == {"1 tokens", "4 tokens"}
    assert "synthetic weights" in view.status.value
    assert "the fastest at each number of tokens" in view.snapshot().html
    kept = view.result
    view.shape_choice.value = "nonsense"
    view.wait(60)
    assert "unknown shape" in view.status.value and view.result is kept
    view.close()


def test_the_switch_is_drawn_with_the_border_in_force():
    curve = measure_switch(tensor("q8_0"), tokens=(1, 8, 64), repeats=3)
    fig = switch_figure(curve)
    for path, drawn in zip(("few", "many"), fig.data, strict=True):
        for point, y, up, down in zip(
            curve.points, drawn.y, drawn.error_y.array, drawn.error_y.arrayminus, strict=True
        ):
            time_s = getattr(point, path)
            ends = [(y - down) * point.tokens / 1e6, (y + up) * point.tokens / 1e6]
            assert ends == pytest.approx([time_s.low, time_s.high])
    said = [a.text for a in fig.layout.annotations]
    assert f"in force: few = {curve.default_few}" in said
    assert len(fig.data) == 2
    assert list(fig.layout.xaxis.tickvals) == [1, 8, 64]


def test_a_border_that_the_repeats_do_not_tell_is_not_drawn():
    curve = measure_switch(tensor("q8_0"), tokens=(1, 8, 64), repeats=3)

    def drawn(ratio: float, default_few: int) -> Any:
        told = Interval(value=ratio, low=0.9 * ratio, high=1.1 * ratio, no_change=1.0)
        points = tuple(replace(p, ratio=told, few=p.many) for p in curve.points)
        return switch_figure(replace(curve, points=points, default_few=default_few))

    either = drawn(1.0, 2)
    said = {a.text: a for a in either.layout.annotations}
    assert len(either.layout.shapes) == 1 and "measured here: no border told apart" in said
    assert said["in force: few = 2"].xanchor == "left"
    assert drawn(1.0, 64).layout.annotations[0].xanchor == "right"
    assert "no border" not in str(drawn(2.0, 2).layout.annotations)


def test_errors_of_settings_against_float32(model):
    coarse = {"quantize": "q4_0", "backend": "torch"}  # exact products of coarse weights
    settings = {"exact": {"backend": "torch"}, "coarse": coarse, "rounded": {"quantize": "q4_0"}}
    before = model.settings
    frame = kernel_frame(model, settings, list(range(2, 20)))
    assert list(frame.index) == list(settings) and model.settings == before
    assert all(re.fullmatch(r"\S+ \[\S+, \S+\]", said) for said in frame.to_numpy()[:, 1:].flat)
    errors = [float(said.split()[0]) for said in frame["experts' output, %"]]
    assert max(errors[:2]) < 0.01 < errors[2] < 3  # the format's own loss is in none of them
