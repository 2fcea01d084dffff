import pytest
from tests.browser.lab import Lab
from tests.browser.test_layouts import cell_of
pytestmark = pytest.mark.browser
@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 800)])
def test_shots(lab: Lab, theme: str, width: int) -> None:
    lab.open("03_expert_offload.ipynb", theme=theme, width=width, height=1400)
    lab.run_all(300)
    for src in ("intensities(", "placement_view = ", "placement_view.snapshot", "scores = ", "scores.plot", "late = ", "gain = ", "gain.plot"):
        lab.show_cell(cell_of(lab, src))
        lab.page.wait_for_timeout(1500)
        lab.screenshot(f"off-{src.strip('( =').replace('.','_')}-{theme}-{width}")
    if theme == "light":
        lab.show_cell(cell_of(lab, "placement_view = "))
        box = lab.page.locator(".js-plotly-plot .hm").first
        print("HM", lab.page.locator(".js-plotly-plot .heatmaplayer").count())
        lab.page.wait_for_timeout(500)
        plot = lab.page.locator(".kt-view .js-plotly-plot:has(.heatmaplayer .hm)").first
        bb = plot.bounding_box(); print(bb)
        lab.page.mouse.click(bb["x"]+bb["width"]*0.5, bb["y"]+bb["height"]*0.5)
        lab.page.wait_for_timeout(2500)
        lab.screenshot("off-clicked")
    print(lab.complaints())
