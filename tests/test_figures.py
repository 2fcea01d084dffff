"""Figures: they hold the numbers they were given, read on any background, and stay offline."""

import json
import re
from itertools import combinations

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktlab import figures

LAYERS = [1, 2, 3]
BITS = np.array([5.5, 5.8, 5.9])


def every_figure() -> dict[str, go.Figure]:
    rng = np.random.default_rng(0)
    ends = (BITS - 0.1, BITS + 0.2)
    capacities = np.arange(5)
    rate = capacities / 4
    lift = np.exp(rng.normal(size=(4, 4)))
    np.fill_diagonal(lift, np.nan)
    return {
        "router_histogram": figures.router_histogram(rng.random(8), rng.random(8), title="layer 1"),
        "load_heatmap": figures.load_heatmap(rng.random((3, 8)), LAYERS),
        "domain_heatmap": figures.domain_heatmap(rng.random((2, 8)), ["prose", "python"]),
        "coactivation_heatmap": figures.coactivation_heatmap(lift),
        "entropy_by_layer": figures.entropy_by_layer(LAYERS, BITS, *ends, 6.0),
        "rates_by_layer": figures.rates_by_layer(LAYERS, BITS, *ends, BITS / 2, y="reuse, share"),
        "divergence_by_layer": figures.divergence_by_layer(LAYERS, BITS, *ends, BITS / 9),
        "hit_rate_curves": figures.hit_rate_curves(
            capacities, {"lru": (rate, rate - 0.1, rate + 0.1)}, rate
        ),
        "pareto": figures.pareto(
            [10, 20, 15], [0.1, 0.3, 0.4], ["k=8", "k=6", "k=4"],
            speed_ends=([9, 19, 14], [11, 21, 16]), kl_ends=([0, 0.2, np.nan], [0.2, 0.4, np.nan]),
            front=[True, True, False], current=1,
        ),
        "stage_bars": figures.stage_bars(
            {"k=8": {"experts": 2.0, "router": 0.1}, "k=6": {"experts": 1.5}}
        ),
        "size_quality": figures.size_quality(
            [2**20, 2**21], [0.2, 0.1], ["q4_0", "q8_0"],
            low=[0.1, 0], high=[0.3, 0.2],
        ),
        "roofline": roofline(16.2, 5226.0),
    }  # fmt: skip


def roofline(read: float, peak: float) -> go.Figure:
    peaks = {"serial": 11.0, "avx2": 240.0, "amx_int8": peak}
    curve = [(2.7, 33.0, "1 token"), (226.0, 370.0, "512 tokens")]
    return figures.roofline({"native amx_int8 packed": curve}, read=read, peaks=peaks)


FIGURES = every_figure()


@pytest.mark.parametrize("name", FIGURES)
def test_reads_on_light_and_dark(name: str) -> None:
    layout = FIGURES[name].layout
    assert layout.paper_bgcolor == layout.plot_bgcolor == "rgba(0,0,0,0)"
    for background in ("#ffffff", "#111111"):
        assert contrast(layout.font.color, background) > 4.2
        for color in (figures.BLUE, figures.ORANGE, figures.GREEN, figures.VERMILION):
            assert contrast(color, background) > 2


@pytest.mark.parametrize("name", FIGURES)
def test_is_valid_offline_and_named_with_units(name: str) -> None:
    fig = FIGURES[name]
    assert "http" not in json.dumps(json.loads(fig.to_json()))
    titles = [fig.layout.xaxis.title.text, fig.layout.yaxis.title.text]
    bars = [t.colorbar.title.text for t in fig.data if t.type == "heatmap"]
    assert any(titles)
    unit = r"operations per byte|expert|bits|uniform|tokens/s|nats|ms|MiB|share|rate|log2"
    assert re.search(unit, " ".join(filter(None, [*titles, *bars])))


def test_figures_leave_plotly_alone() -> None:
    import plotly.io as pio

    before = pio.templates.default
    figures.figure("x")
    assert pio.templates.default == before


def test_numbers_arrive_unchanged() -> None:
    fig = FIGURES["entropy_by_layer"]
    assert list(fig.data[0].y) == list(BITS) and list(fig.data[0].x) == ["1", "2", "3"]
    np.testing.assert_allclose(fig.data[0].error_y.array, 0.2)
    np.testing.assert_allclose(fig.data[0].error_y.arrayminus, 0.1)
    bars = {trace.name: list(trace.x) for trace in FIGURES["stage_bars"].data}
    assert bars == {"experts": [2.0, 1.5], "router": [0.1, 0.0]}
    assert list(FIGURES["size_quality"].data[0].x) == [1, 2]


def test_missing_limits_draw_no_bar() -> None:
    assert list(FIGURES["pareto"].data[1].error_y.array) == pytest.approx([0.1, 0.1, 0])
    fig = figures.entropy_by_layer([1], [5.0], [np.nan], [np.inf], 6)
    assert list(fig.data[0].error_y.array) == [0]


def test_coactivation_is_logarithmic_and_cut() -> None:
    lift = np.array([[np.nan, 2.0], [0.0, 64.0]])
    shown = figures.coactivation_heatmap(lift, limit=3).data[0].z
    np.testing.assert_array_equal(shown, [[np.nan, 1], [-3, 3]])
    bar = figures.coactivation_heatmap(lift).data[0].colorbar
    assert list(bar.ticktext) == ["≤ -2", "-1", "0", "1", "≥ 2"], "what is cut says so"


def test_pareto_marks_front_and_current() -> None:
    front, points = FIGURES["pareto"].data
    assert list(front.x) == [10, 20]
    assert points.marker.color[1] == figures.BLUE and points.marker.color[2] == figures.INK
    assert FIGURES["pareto"].layout.yaxis.autorange == "reversed"
    assert len(figures.pareto([], [], []).data[1].x) == 0


values = st.integers(0, 4).map(float)


@given(st.lists(st.tuples(values, values), min_size=1, max_size=12))
def test_pareto_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    speed, kl = zip(*points, strict=True)
    found = figures.pareto_front(speed, kl)
    for i, (s, k) in enumerate(points):
        beaten = any(
            (a >= s and b <= k) and (a > s or b < k) for j, (a, b) in enumerate(points) if i != j
        )
        assert found[i] == (not beaten)
    assert found.any()


def test_pareto_front_ignores_unknown_points() -> None:
    assert figures.pareto_front([1, np.nan, 2], [0.1, 0, np.nan]).tolist() == [True, False, False]


def test_curves_differ_in_more_than_colour() -> None:
    rate = np.linspace(0, 1, 5)
    curves = {str(i): (rate, rate, rate) for i in range(4)}
    lines = [t for t in figures.hit_rate_curves(np.arange(5), curves).data if t.line.dash]
    assert len({t.line.dash for t in lines}) == 4


@given(read=st.floats(1, 100), peak=st.floats(300, 10_000))
def test_roofline_words_lie_within_its_lines(read: float, peak: float) -> None:
    """Plotly ends this axis where the lines end; there, rounding decides what it draws."""
    fig = roofline(read, peak)
    ends = [float(x) for trace in fig.data for x in trace.x]
    places = {note.text: 10**note.x for note in fig.layout.annotations}
    assert any("amx_int8" in words for words in places)
    assert 1.01 * min(ends) < min(places.values()), places
    assert max(places.values()) < 0.99 * max(ends), places
    slope = next(note for note in fig.layout.annotations if note.text.startswith("read"))
    assert (slope.xanchor, slope.yanchor) == ("right", "bottom")  # every ceiling is right or below
    assert 10**slope.y <= 1.001 * read * 10**slope.x and 10**slope.y <= 1.001 * peak


def test_palette_is_told_apart_by_colour_blind_eyes() -> None:
    """Pairwise distance in CIELAB, as deuteranopes and protanopes see (Machado et al. 2009)."""
    deutan = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
    protan = [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]
    for matrix in (deutan, protan):
        seen = [lab(np.clip(np.array(matrix) @ linear(c), 0, 1)) for c in figures.COLORS[:4]]
        assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 10


def linear(color: str) -> np.ndarray:
    srgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    """WCAG 2 contrast ratio."""
    bright = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) + 0.05 for c in (a, b))
    return bright[1] / bright[0]


def lab(rgb: np.ndarray) -> np.ndarray:
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    ratio = np.array(to_xyz) @ rgb / [0.9505, 1, 1.089]
    f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_the_line_at_uniform_has_no_words_on_the_bars():
    fig = figures.router_histogram([1.0, 2.0], [1.5, 1.5])
    assert len(fig.layout.shapes) == 1 and not fig.layout.annotations
    named = figures.entropy_by_layer([1], [2.0], [1.9], [2.1], 3.0)
    assert [a.text for a in named.layout.annotations] == [
        "all experts alike: 3 bits, the most there can be"
    ]
