"""Live figures come up filled, follow changes made before and after they are drawn, and resize."""

from pathlib import Path

import pytest

from tests.browser.lab import Lab
from tests.browser.test_harness import write_notebook

pytestmark = pytest.mark.browser

FIGURES = """\
import ipywidgets as widgets
import plotly.graph_objects as go
from ktlab.notebook.live_figure import LiveFigure

figures = [LiveFigure(go.Bar(y=[3, 1, 2])) for _ in range(6)]
for figure in figures:
    figure.update_layout(height=150, margin=dict(l=20, r=0, t=0, b=20), autosize=True)
button = widgets.Button(description="press")
button.add_class("the-button")
presses = 0

def pressed(_):
    global presses
    presses += 4
    for figure in figures:
        for count in range(presses, presses + 4):
            with figure.batch_update():
                figure.data[0].y = list(range(1, count + 1))
                figure.layout.title.text = "pressed"

button.on_click(pressed)
widgets.VBox([button, *figures])
"""
NEVER_DONE = """async () => {
    const plotly = await ktlabPlotly.plotly(), react = plotly.react, seen = new Set();
    plotly.react = (plot, ...state) => {
        const drawing = react(plot, ...state);
        return seen.has(plot) ? drawing : (seen.add(plot), new Promise(() => {}));
    };
}"""
"""A drawing of which Plotly never says that it is done, once a figure."""
LATE = (
    "const ask = AbortSignal.timeout; AbortSignal.timeout = ms => ask.call(AbortSignal, ms / 1e6)"
)
"""anywidget gives a widget's JavaScript two seconds to be ready, which a busy page may not keep."""
CHANGED_AT_ONCE = "figures[0].data[0].y = [1, 2, 3, 4, 5]"


def bars(count: int, figures: int = 6) -> str:
    plots = "[...document.querySelectorAll('.js-plotly-plot')]"
    each = f"plot => plot.querySelectorAll('.bars .point').length === {count}"
    return f"{plots}.filter({each}).length === {figures}"


@pytest.mark.parametrize("late", [False, True])
def test_figures_follow_their_objects(lab: Lab, notebook_folder: Path, late: bool) -> None:
    if late:
        lab.page.add_init_script(LATE)
    name = write_notebook(notebook_folder, "live-figure.ipynb", FIGURES, CHANGED_AT_ONCE)
    lab.open(name, theme="light", height=1500)
    lab.run_all()
    assert lab.page.evaluate("document.body.dataset.jpThemeLight === 'true'")
    lab.wait_until(bars(5, figures=1))
    lab.wait_until(bars(3, figures=5))
    lab.page.click(".the-button")
    lab.wait_until(bars(7))
    lab.screenshot("live-figure")
    lab.page.evaluate(NEVER_DONE)
    lab.page.click(".the-button")
    lab.wait_until(bars(11))
    width = "document.querySelector('.js-plotly-plot .main-svg').clientWidth"
    wide = lab.page.evaluate(width)
    lab.page.set_viewport_size({"width": 800, "height": 1500})
    lab.wait_until(f"{width} < {wide - 200}")
    told = {line for line in lab.complaints() if "[anywidget] Failed to initialize" in line}
    assert bool(told) == late and not set(lab.complaints()) - told
