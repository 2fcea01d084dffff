"""Notebook 03 in JupyterLab in Chromium: a click on the map moves an expert.

Leaves a screenshot in .artifacts/screenshots.
"""

import pytest

from tests.browser.lab import Lab

pytestmark = pytest.mark.browser

NOTEBOOK = "03_expert_offload.ipynb"
MAP = """() => {
    const plot = [...document.querySelectorAll('.js-plotly-plot')].find(plot =>
        plot.getBoundingClientRect().top > 0 && plot.data[0]?.type === 'heatmap'
        && plot.layout.title?.text?.includes('click to move'));
    if (!plot) return null;
    const box = plot.querySelector('.nsewdrag').getBoundingClientRect();
    const {xaxis, yaxis} = plot._fullLayout;
    return {x: box.x + xaxis.l2p(20), y: box.y + yaxis.l2p(2)};
}"""
"""Where the live map has expert 20 of layer 2."""
COUNT = """() => document.body.innerText.match(/(\\d+) of 384 experts, /)?.[1]"""


@pytest.mark.parametrize(("theme", "width"), [("dark", 800)])
def test_a_click_moves_an_expert(lab: Lab, theme: str, width: int) -> None:
    lab.open(NOTEBOOK, theme=theme, width=width, height=1300)
    lab.run_all(180)
    lab.show_cell(lab.cell_of("placement_view = "))
    before = None
    while before != (place := lab.wait_until(MAP, 30)):  # what is above it still grows
        before = place
        lab.page.wait_for_timeout(300)
    assert lab.page.evaluate(COUNT) == "96"
    lab.page.mouse.click(place["x"], place["y"])
    lab.wait_until(f"['95', '97'].includes(({COUNT})())", 30)
    lab.screenshot(f"offload-{theme}-{width}")
    assert not lab.complaints()
