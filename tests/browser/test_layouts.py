"""Notebook 06 in JupyterLab in Chromium: bytes that answer the mouse, a walk, the roofline.

Leaves screenshots in .artifacts/screenshots.
"""

import pytest

from tests.browser.lab import Lab

pytestmark = pytest.mark.browser

NOTEBOOK = "06_layouts_and_kernels.ipynb"
LONG_S = 300
OUTLINED = """() => [...document.querySelectorAll('.kb-panel i')]
    .filter(cell => getComputedStyle(cell).outlineStyle === 'solid').length"""
DRAWN = """() => [...document.querySelectorAll('.js-plotly-plot')].some(plot =>
    plot.getBoundingClientRect().top > 0
    && plot.data.filter(trace => trace.mode === 'lines+markers' && trace.x?.length > 1).length > 1
    && [...plot.querySelectorAll('.annotation-text')].some(a => a.textContent.includes('avx')))"""
"""The live roofline: curves (on a slow machine of the fastest only), and words at the flats."""


@pytest.mark.parametrize(("theme", "width"), [("light", 1280)])
def test_layouts_and_kernels(lab: Lab, theme: str, width: int) -> None:
    lab.open(NOTEBOOK, theme=theme, width=width, height=1300)
    page, name = lab.page, f"{theme}-{width}"
    lab.run_all(LONG_S)

    lab.show_cell(lab.cell_of("bytes_view = "))
    byte = lab.wait_for(".kb-blocks i.w0")
    byte.hover()
    assert page.evaluate(OUTLINED) > 0, "the packed drawing does not mark the hovered weights"
    says = byte.get_attribute("data-t") or ""
    assert "column 0, code" in says
    lab.screenshot(f"layouts-bytes-{name}")
    page.locator(".kb-panel i.mine").nth(40).hover()
    lab.screenshot(f"layouts-bytes-packed-{name}")
    assert page.evaluate(
        "() => [...document.querySelectorAll('.kb')].every(k => k.scrollWidth <= k.clientWidth + 1)"
    ), "the drawing is wider than the page"

    lab.show_cell(lab.cell_of("tile_view = "))
    lab.wait_until("document.querySelectorAll('.js-plotly-plot .hm').length >= 3")
    page.wait_for_timeout(500)
    lab.screenshot(f"layouts-tiles-{name}")
    lab.wait_until(
        "[...document.querySelectorAll('.kt-status')].some(s => s.innerText.includes('TDPBSUD'))"
    )
    page.click("button:text-is('AVX-512: VPDPBUSD')")
    lab.wait_until(
        "[...document.querySelectorAll('.kt-status')].some(s => s.innerText.includes('VPDPBUSD'))"
    )
    lab.screenshot(f"layouts-tiles-vnni-{name}")

    lab.show_cell(lab.cell_of("roofline = "))
    lab.wait_until(DRAWN, LONG_S)
    page.wait_for_timeout(800)
    lab.screenshot(f"layouts-roofline-{name}")
    lab.show_cell(lab.cell_of("switch_figure(curve)"))
    page.wait_for_timeout(1500)
    lab.screenshot(f"layouts-switch-{name}")
    lab.show_cell(lab.cell_of("kernel_frame(model"))
    page.wait_for_timeout(800)
    lab.screenshot(f"layouts-errors-{name}")
    assert not lab.complaints()
