"""The browser harness itself, on a notebook of ten lines: widgets, Plotly, themes, complaints."""

from pathlib import Path

import nbformat
import pytest

from tests.browser.lab import Lab

pytestmark = pytest.mark.browser

WIDGETS = """\
import ipywidgets as widgets
import plotly.graph_objects as go
from ktlab.notebook.live_figure import LiveFigure

figure = LiveFigure(go.Bar(y=[3, 1, 2]))
button = widgets.Button(description="press")
button.add_class("the-button")
label = widgets.Label("not pressed")
label.add_class("the-label")

def pressed(_):
    label.value = "pressed"
    with figure.batch_update():
        figure.data[0].y = [1, 2, 3, 4, 5]

button.on_click(pressed)
widgets.VBox([button, label, figure])
"""
BARS = "document.querySelectorAll('.js-plotly-plot .bars .point').length"


def write_notebook(folder: Path, name: str, *sources: str) -> str:
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in sources],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    nbformat.write(notebook, folder / name)
    return name


def test_widgets_and_figures_answer_in_the_dark(lab: Lab, notebook_folder: Path) -> None:
    lab.open(write_notebook(notebook_folder, "harness-dark.ipynb", WIDGETS), theme="dark")
    lab.run_all()
    lab.wait_until(f"{BARS} === 3")
    seconds = lab.seconds_until(
        "document.querySelector('.the-label').textContent === 'pressed'",
        lambda: lab.page.click(".the-button"),
    )
    assert 0 < seconds < 10
    lab.wait_until(f"{BARS} === 5")
    assert lab.page.evaluate("document.body.dataset.jpThemeLight === 'false'")
    assert lab.screenshot("harness-dark").stat().st_size > 5_000
    assert not lab.complaints()


def test_complaints_and_a_failing_cell_are_heard(lab: Lab, notebook_folder: Path) -> None:
    lab.open(
        write_notebook(
            notebook_folder,
            "harness-complaints.ipynb",
            "import sys; print('from the cell', file=sys.stderr)",
            "import os; os.write(2, b'Traceback (most recent call last)\\n')",
            "1 / 0",
        )
    )
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        lab.run_all()
    lab.page.evaluate("console.error('from the page')")
    text = "\n".join(lab.complaints())
    assert "from the cell" in text
    assert "from the page" in text
    assert "Traceback" in text
