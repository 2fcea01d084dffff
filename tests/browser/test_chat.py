"""The chat cell of notebook 00 in JupyterLab in Chromium: typed into, stopped, switched.

Leaves screenshots in .artifacts/screenshots.
"""

import pytest

from tests.browser.lab import Lab

pytestmark = pytest.mark.browser

COSTS = "document.querySelectorAll('.kt-chat .cost').length"
ENTRY = ".kt-chat-entry input"


@pytest.mark.parametrize(("theme", "width"), [("dark", 800)])
def test_the_chat_cell(lab: Lab, theme: str, width: int) -> None:
    lab.open("00_start.ipynb", theme=theme, width=width)
    page, name = lab.page, f"{theme}-{width}"
    lab.run_all(300)
    cells = page.evaluate(
        "() => window.jupyterapp.shell.currentWidget.content.model.toJSON().cells"
    )
    index = next(i for i, cell in enumerate(cells) if "ChatView" in "".join(cell["source"]))
    lab.show_cell(index)
    lab.wait_until(f"{COSTS} === 1", 60)
    page.fill(ENTRY, "def quicksort(items):")
    page.press(ENTRY, "Enter")
    lab.wait_until(f"{COSTS} === 2", 60)
    assert page.input_value(ENTRY) == ""
    page.fill(ENTRY, "/experts 4")
    page.press(ENTRY, "Enter")
    lab.wait_for(".kt-chat .remark")
    page.fill(ENTRY, "/max 2000")
    page.press(ENTRY, "Enter")
    lab.wait_until("document.querySelectorAll('.kt-chat .remark').length === 2")
    page.fill(ENTRY, "class Node:")
    page.press(ENTRY, "Enter")
    lab.wait_until("[...document.querySelectorAll('.kt-chat .model')].at(-1).innerText.length > 40")
    page.get_by_role("button", name="stop").last.click()
    lab.wait_until(f"{COSTS} === 3", 30)
    cost = page.locator(".kt-chat .cost").last.inner_text()
    assert "stopped by you" in cost and "4 experts, trained with 8" in cost
    assert page.locator(".kt-chat .cost").last.is_visible(), "the newest is scrolled to"
    assert page.evaluate(
        "() => { const c = document.querySelector('.kt-chat');"
        " return c.scrollWidth <= c.clientWidth + 1; }"
    ), "a line is wider than the chat"
    page.locator(ENTRY).scroll_into_view_if_needed()
    lab.screenshot(f"chat-{name}")
    assert not lab.complaints()
