"""The control room's switches of format, layout, backend, instruction set; the true-size twin."""

import pytest

from tests.browser.lab import Lab
from tests.browser.test_control_room import LONG_S, NOTEBOOK, RUN_FIRST_CELL, SETTING, STATUS

pytestmark = pytest.mark.browser

KERNEL = "document.querySelector('.cr-kernel')?.dataset.{}"
SOON_S = 30
"""Known without measuring; generous, because the machine may be busy."""
TWIN = "document.querySelector('.cr-twin')?.dataset.{}"


@pytest.mark.parametrize(("theme", "width"), [("dark", 800)])
def test_switches_and_twin(lab: Lab, theme: str, width: int) -> None:
    lab.open(NOTEBOOK, theme=theme, width=width, height=2300)
    page, name = lab.page, f"{theme}-{width}"
    page.evaluate(RUN_FIRST_CELL)
    lab.wait_until(f"{SETTING} === 'k=8'", LONG_S)
    assert page.evaluate(KERNEL.format("layout")) == "packed", "a small bank is"

    page.select_option(".cr-c-layout select", "ggml_blocks")
    lab.wait_until(f"{KERNEL.format('layout')} === 'ggml_blocks'", SOON_S)
    lab.wait_until(f"{SETTING} === 'k=8 · ggml_blocks'", LONG_S)
    offered = page.locator(".cr-c-isa option").all_inner_texts()
    assert offered[0] == "auto" and "serial" in offered
    title = page.locator(".cr-c-isa select").get_attribute("title") or ""
    assert "not on offer" in title or "all usable here" in title
    page.select_option(".cr-c-isa select", "avx2")
    lab.wait_until(f"{KERNEL.format('kernel')} === 'native avx2'", SOON_S)
    page.select_option(".cr-c-backend select", "numba")  # frees the instruction set
    lab.wait_until(f"{KERNEL.format('kernel')} === 'numba'", SOON_S)
    assert page.input_value(".cr-c-isa select") == "auto"
    page.select_option(".cr-c-backend select", "auto")
    # The answer draws these lines anew, and closed: look once it is there.
    lab.wait_until(f"{KERNEL.format('kernel')}.startsWith('native')", SOON_S)
    lab.wait_until(f"{STATUS} === 'done'", LONG_S)
    page.click(".cr-explain summary")
    assert "chosen" in page.locator(".cr-explain table").inner_text()
    page.wait_for_timeout(300)
    lab.screenshot(f"control-room-kernels-{name}")
    page.click(".cr-explain summary")

    page.select_option(".cr-c-twin select", "deepseek-v2-lite: 2048 x 1408")
    lab.wait_until(f"{STATUS} === 'twin'", LONG_S)
    page.wait_for_timeout(1500)
    lab.screenshot(f"control-room-twin-busy-{name}")
    lab.wait_until(f"{TWIN.format('phases')} === '2'", LONG_S)
    lab.wait_until(f"{STATUS} === 'done'", LONG_S)
    said = page.locator(".cr-panel-twin").inner_text()
    assert "synthetic weights" in said and "of its 64 experts" in said
    assert "decode, 1 token" in said and "prefill" in said
    assert page.evaluate(
        "() => document.querySelector('.ktlab-room').scrollWidth"
        " <= document.querySelector('.ktlab-room').clientWidth + 1"
    ), "the room is wider than the page"
    lab.screenshot(f"control-room-twin-{name}")
    assert not lab.complaints()
