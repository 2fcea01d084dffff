"""Timelines: scheduled by hand, drawn, written and read."""

import pytest

from ktlab.errors import SettingError
from ktlab.placement.timeline import Span, Task, Timeline, plot_timelines, schedule

TASKS = (
    Task(name="a0", lane="GPU", label="layer 0 attention", kind="attention", seconds=2.0),
    Task(name="e0", lane="CPU", label="layer 0 experts", kind="experts", seconds=5, after=("a0",)),
    Task(name="s0", lane="GPU", label="layer 0 shared", kind="shared", seconds=1, after=("a0",)),
    Task(
        name="a1", lane="GPU", label="layer 1 attention", kind="attention", seconds=2,
        after=("e0", "s0"),
    ),
)  # fmt: skip


def test_a_lane_takes_its_tasks_in_order_and_waits_for_others() -> None:
    line = schedule(TASKS, title="two layers", method="made up")
    assert [(s.start_s, s.end_s) for s in line.spans] == [(0, 2), (2, 7), (2, 3), (7, 9)]
    assert line.lanes == ("GPU", "CPU") and line.seconds == 9
    assert line.busy("GPU") == 5 and line.busy("CPU") == 5 and line.overlap("GPU", "CPU") == 1
    assert line.by_kind("GPU") == {"attention": 4, "shared": 1}
    assert [line.spans[i].label for i in line.critical] == [
        "layer 0 attention", "layer 0 experts", "layer 1 attention",
    ]  # fmt: skip


def test_overlapping_spans_of_a_lane_count_once() -> None:
    spans = [(0, 4), (2, 3), (3.5, 6), (8, 9)]
    line = Timeline(
        spans=tuple(Span(lane="link", label="copy", start_s=a, end_s=b) for a, b in spans)
    )
    assert line.busy("link") == 7 and line.overlap("link", "link") == 7


def test_it_is_plain_data() -> None:
    line = schedule(TASKS, title="two layers")
    assert Timeline.from_json(line.to_json()) == line
    frame = line.to_frame()
    assert frame["critical"].tolist() == [True, True, False, True]
    assert frame["after"].tolist()[-1] == "layer 0 experts, layer 0 shared"


def test_text_and_html_show_lanes_and_times() -> None:
    line = schedule(TASKS, title="<two> layers", method="made up")
    lines = repr(line).splitlines()
    assert lines[0] == "Timeline of <two> layers: 9 s" and "made up" in lines[-1]
    assert lines[1].startswith("  GPU |##") and lines[1].endswith("busy 5 s, 56%")
    short = schedule([*TASKS[:1], Task(name="x", lane="link", label="x", seconds=1e-6)])
    assert repr(short).count("=") == 2, "what is shorter than a character is shown all the same"
    page = line._repr_mimebundle_()["text/html"]
    assert "&lt;two&gt;" in page and "<two>" not in page
    assert repr(Timeline(spans=())) == "Timeline: 0 s"


def test_the_figure_has_a_bar_for_each_span_on_one_axis() -> None:
    line = schedule(TASKS, title="two layers")
    fig = line.plot()
    assert {trace.name: list(trace.base) for trace in fig.data} == {
        "attention": [0, 7], "experts": [2], "shared": [2],
    }  # fmt: skip
    assert (
        fig.layout.xaxis.ticksuffix == "s" and "the end waited for it" in fig.data[0].hovertext[0]
    )
    both = plot_timelines({"now": line, "then": schedule(TASKS[:1])})
    assert list(both.data[0].y[0]) == ["now<br>9 s", "now<br>9 s", "then<br>2 s"]


def test_what_cannot_be_scheduled_is_said_at_once() -> None:
    with pytest.raises(SettingError) as told:
        schedule(
            [
                Task(name="a", lane="CPU", label="a", seconds=float("nan"), after=("b",)),
                Task(name="b", lane="CPU", label="b", seconds=1),
                Task(name="b", lane="CPU", label="b", seconds=1),
            ]
        )
    for part in ("'a' takes nan s", "'a' waits for 'b'", "two tasks are named 'b'"):
        assert part in str(told.value)
    with pytest.raises(SettingError, match=r"goes from 2 s to 1 s.*waits for \[0\]"):
        Timeline(spans=(Span(lane="CPU", label="x", start_s=2, end_s=1, after=(0,)),))
    with pytest.raises(SettingError, match="no lane 'GPV'; did you mean \"GPU\""):
        schedule(TASKS).busy("GPV")


def test_kinds_have_the_same_colour_whatever_else_a_timeline_has() -> None:
    def colours(*kinds: str) -> dict[str, str]:
        spans = (Span(lane="CPU", label=k, kind=k, start_s=i, end_s=i + 1)
                 for i, k in enumerate(kinds))  # fmt: skip
        fig = plot_timelines({"": Timeline(spans=tuple(spans))})
        return {bar.name: bar.marker.color for bar in fig.data}

    host = colours("attention", "shared, dense", "experts", "output")
    device = colours("attention", "copies", "launch", "experts", "shared, dense")
    assert {kind: device[kind] for kind in host if kind in device} == {
        kind: host[kind] for kind in host if kind in device
    }
    assert len(set(device.values())) == len(device)
