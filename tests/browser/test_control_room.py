"""The control room as a reader meets it: notebook 01 in JupyterLab in Chromium.

Leaves screenshots in .artifacts/screenshots and the latencies in .artifacts/latency-*.json.
"""

import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import pytest

from tests.browser.lab import ROOT, Lab

pytestmark = pytest.mark.browser

NOTEBOOK = "01_six_or_eight.ipynb"
LATENCY_LIMIT_S = 0.150
BARE_S = 0.050
"""From press to answer of a button that only counts, in a room at rest on an idle machine."""
LONG_S = 240

RUN_FIRST_CELL = """async () => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    notebook.activeCellIndex = notebook.model.toJSON().cells.findIndex(
        cell => cell.cell_type === 'code');
    await window.jupyterapp.commands.execute('notebook:run-cell');
}"""
RUN_ABOVE = """async (source) => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    const {commands} = window.jupyterapp;
    notebook.activeCellIndex = notebook.model.toJSON().cells.findIndex(
        cell => cell.cell_type === 'code');
    await commands.execute('notebook:insert-cell-above');
    notebook.activeCell.model.sharedModel.setSource(source);
    await commands.execute('notebook:run-cell');
}"""
BARE_BUTTON = """
import ipywidgets

count = ipywidgets.HTML()
button = ipywidgets.Button(description="count").add_class("bare-button")

def pressed(_, times=[0]):
    times[0] += 1
    count.value = f'<i class="pressed" data-times="{times[0]}"></i>'

button.on_click(pressed)
ipywidgets.HBox([button, count])
"""
STATUS = "document.querySelector('.cr-status')?.dataset.phase"
STALE = "document.querySelector('.cr-grid').classList.contains('cr-stale')"
SETTING = "document.querySelector('.cr-quality')?.dataset.setting"
BUTTON = ".cr-c-quick-k button:text-is('{}')"
NUMBERS = """() => [...document.querySelectorAll('.cr-quality .cr-tile, .cr-speed .cr-tile')]
    .map(tile => tile.innerText)"""
BARS = """() => [...document.querySelectorAll('.cr-panel-router .bars')].pop()
    .querySelectorAll('.point path').values().map(path => path.getAttribute('d')).toArray()
    .join(' ')"""
POINTS = """() => [...document.querySelectorAll('.cr-panel-plane .textpoint text')]
    .map(text => text.textContent)"""


@pytest.fixture
def room(lab: Lab):
    """Opens 01, shows its control room and waits for the first answer."""

    def start(theme: str, width: int, height: int = 1750) -> Lab:
        lab.open(NOTEBOOK, theme=theme, width=width, height=height)
        lab.page.evaluate(RUN_FIRST_CELL)
        lab.wait_until(f"{SETTING} === 'k=8'", LONG_S)
        return lab

    return start


def wait_done(lab: Lab) -> None:
    lab.wait_until(f"{STATUS} === 'done'", LONG_S)


def test_six_then_eight(room) -> None:
    lab = room("light", 1280)
    page = lab.page
    wait_done(lab)
    lab.wait_until(f"({BARS})().length > 0 && ({POINTS})().includes('k=8')")
    numbers, bars = page.evaluate(NUMBERS), page.evaluate(BARS)
    lab.screenshot("control-room-8-light-1280")

    page.click(BUTTON.format(6))
    lab.wait_until(f"{SETTING} === 'k=6'")
    lab.screenshot("control-room-6-first-answer")
    wait_done(lab)
    lab.wait_until(f"({POINTS})().includes('k=6')")
    changed = page.evaluate(NUMBERS)
    assert changed[0] != numbers[0], "the KL divergence has not changed"
    assert page.evaluate(BARS) != bars, "the histogram has not changed"
    assert "no change" not in changed[0]
    written = page.locator(".cr-text").inner_text()
    told = re.search(r"would write something else here \((\d+) of \d+\)", written)
    assert told and "k=6 writes" in written
    # How many tokens change is the model's business; as many as the panel says are marked.
    marked = page.locator(".cr-text .cr-changed").count()
    assert marked >= int(told[1]) and bool(marked) == (int(told[1]) > 0)
    assert page.locator(".cr-bars i").count() > 8, "no stages"
    title = page.get_attribute("[data-number=kl_mean]", "title") or ""
    assert "tokens" in title and "room.results.quality.kl_mean" in title
    lab.screenshot("control-room-6-light-1280")

    page.click(BUTTON.format(8))
    lab.wait_until(f"{SETTING} === 'k=8'", 5)
    lab.wait_until(f"({BARS})() === arg".replace("arg", json.dumps(bars)), 5)
    assert page.evaluate(NUMBERS) == numbers, "the baseline's numbers have not returned"
    assert page.evaluate(STATUS) == "done", "known results were measured again"
    assert set(page.evaluate(POINTS)) == {"k=8", "k=6"}
    assert not lab.complaints()


def test_own_text_bad_input_and_stop_on_a_narrow_dark_page(room) -> None:
    lab = room("dark", 800, 2600)
    page = lab.page
    assert page.evaluate(
        "() => document.querySelector('.ktlab-room').scrollWidth"
        " <= document.querySelector('.ktlab-room').clientWidth + 1"
    ), "the room is wider than the page"

    page.select_option(".cr-c-text select", "own text")
    lab.wait_for(".cr-hint")
    box = page.locator(".cr-own textarea")
    box.fill("a")
    page.click("button:text-is('evaluate this text')")
    assert "expected at least 3" in lab.wait_for(".cr-error").inner_text()
    assert box.input_value() == "a", "what was typed is gone"
    lab.screenshot("control-room-bad-input-dark-800")

    box.fill("The quick brown fox jumps over the lazy dog. " * 12)
    page.click("button:text-is('evaluate this text')")
    lab.wait_until("document.querySelector('.cr-quality')?.dataset.text === 'own text'")
    lab.wait_until("!document.querySelector('.cr-error')")

    page.click(BUTTON.format(6))
    lab.wait_until(f"{SETTING} === 'k=6'")
    page.click(".cr-stop")
    lab.wait_until(f"{STATUS} === 'stopped'", 5)
    page.click(".cr-stop")
    lab.wait_until(f"{STATUS} !== 'stopped'", 5)
    wait_done(lab)
    lab.screenshot("control-room-own-text-dark-800")
    page.set_viewport_size({"width": 1280, "height": 1750})
    page.wait_for_timeout(500)
    lab.screenshot("control-room-own-text-dark-1280")
    assert not lab.complaints()


@pytest.mark.alone
def test_the_latest_toggle_wins_and_the_first_answer_is_quick(room) -> None:
    lab = room("light", 1280, 1000)
    page = lab.page
    slider = page.locator(".cr-c-top-k .noUi-handle")
    for name in (6, 8, 6):
        page.click(BUTTON.format(name), no_wait_after=True)
    # ipywidgets holds a widget's next message back until the one before is answered, so the last of
    # three presses within a few milliseconds may reach the kernel after a press of another widget.
    lab.wait_until(f"{SETTING} === 'k=6'", LONG_S)
    page.wait_for_timeout(1500)
    assert page.evaluate(SETTING) == "k=6", "an older toggle came through"
    slider.focus()
    slider.press("ArrowLeft")
    slider.press("ArrowLeft")
    lab.wait_until(f"{SETTING} === 'k=4'", 30)
    page.wait_for_timeout(1500)
    assert page.evaluate(SETTING) == "k=4", "an older step came through"

    fresh: list[float] = []
    known: list[float] = []
    page.click(BUTTON.format(8))
    for text in ("chinese", "dictionary", "german", "python", "russian"):
        page.select_option(".cr-c-text select", text)
        for form in ("absorbed", "naive"):
            page.click(f".cr-c-attention button:text-is('{form}')")
            suffix = "" if form == "absorbed" else " · naive"
            lab.wait_until(shown(f"k=8{suffix}", text))
            for name, kind in ((6, fresh), (8, known)):
                page.wait_for_timeout(700)  # a reader looks before pressing again
                number = shown(f"k={name}{suffix}", text)
                kind.append(
                    seconds_from_press(lab, partial(page.click, BUTTON.format(name)), number)
                )
    hold_the_promise(lab, "toggles", {"never measured before": fresh, "known already": known})


@pytest.mark.alone
def test_the_slider_and_the_switches_answer_at_once(room) -> None:
    lab = room("light", 1280, 1000)
    page = lab.page
    slider = page.locator(".cr-c-top-k .noUi-handle")
    slid: list[float] = []
    laid_out: list[float] = []
    taken: list[float] = []
    texts = ("chinese", "dictionary", "german", "python", "russian")
    formats = ("q6_k", "q5_k", "q4_k", "q4_0", "int8_channel")
    for text, format in zip(texts, formats, strict=True):
        page.select_option(".cr-c-text select", text)
        lab.wait_until(shown("k=8", text))
        slider.focus()
        for k in (7, 6):
            page.wait_for_timeout(700)
            number = shown(f"k={k}", text)
            slid.append(
                seconds_from_press(lab, lambda: slider.press("ArrowLeft"), number, "keydown")
            )
        page.click(BUTTON.format(8))
        # Weights in another format are made first: then the press is seen to be taken, and the
        # numbers that are still there to be old.
        for switch, value, first, kind in (
            ("layout", "ggml_blocks", shown, laid_out),
            ("experts", format, taken_or_shown, taken),
        ):
            lab.wait_until(shown("k=8", text))
            page.wait_for_timeout(700)
            select, label = f".cr-c-{switch} select", f"k=8 · {value}"
            choose = lambda s=select, v=value: page.select_option(s, v)  # noqa: E731
            kind.append(seconds_from_press(lab, choose, first(label, text), "change"))
            lab.wait_until(shown(label, text))
            page.select_option(select, index=0)
    lab.wait_until(shown("k=8", text))
    kinds = {"the slider": slid, "another layout": laid_out, "another format, taken": taken}
    hold_the_promise(lab, "switches", kinds)


def shown(label: str, text: str) -> str:
    """That the numbers on the page are those of a setting on a text."""
    where = "document.querySelector('.cr-quality').dataset.text"
    return f"{SETTING} === '{label}' && {where} === '{text}' && !{STALE}"


def taken_or_shown(label: str, text: str) -> str:
    """That a press is answered: by numbers, or by what is done and old numbers greyed."""
    told = f"document.querySelector('.cr-status').textContent.includes('{label} against')"
    return f"({shown(label, text)}) || ({told} && {STALE})"


def seconds_from_press(
    lab: Lab, press: Callable[[], None], expression: str, event: str = "click"
) -> float:
    """From the event's own time stamp to the first frame in which `expression` holds."""
    lab.page.evaluate(
        """([source, event]) => {
            const holds = eval('() => (' + source + ')');
            window.ktlabSeconds = null;
            document.addEventListener(event, (event) => {
                const look = (now) => {
                    if (holds()) window.ktlabSeconds = (now - event.timeStamp) / 1000;
                    else requestAnimationFrame(look);
                };
                requestAnimationFrame(look);
            }, {once: true, capture: true});
        }""",
        [expression, event],
    )
    press()
    return float(lab.wait_until("() => window.ktlabSeconds", 30))


def hold_the_promise(lab: Lab, name: str, kinds: dict[str, list[float]]) -> None:
    """Medians within the promise, which is made for a machine that nobody else uses: a slower or
    busier one, as a button shows that only counts, has longer."""
    page = lab.page
    page.evaluate("() => document.querySelector('.cr-stop').click()")  # disabled where all is done
    lab.wait_until(f"{STATUS} === 'stopped' || {STATUS} === 'done'", LONG_S)
    page.evaluate(RUN_ABOVE, BARE_BUTTON)
    lab.wait_for(".bare-button")
    bare: list[float] = []
    for time in range(1, 11):
        page.wait_for_timeout(300)
        pressed = f"document.querySelector('.pressed')?.dataset.times === '{time}'"
        bare.append(seconds_from_press(lab, lambda: page.click(".bare-button"), pressed))
    report_latencies(name, {"a button that only counts": bare, **kinds})
    assert not lab.complaints()
    limit_s = LATENCY_LIMIT_S * max(1.0, median(bare) / BARE_S)
    late = {kind: median(seconds) for kind, seconds in kinds.items() if median(seconds) >= limit_s}
    assert not late, f"medians beyond {limit_s:.3f} s: {late}"


def report_latencies(name: str, kinds: dict[str, list[float]]) -> None:
    """Prints the table and writes it, in milliseconds, from press to changed number on the page."""
    rows = {
        kind: {
            "presses": len(seconds),
            "median_ms": round(1e3 * median(seconds), 1),
            "max_ms": round(1e3 * max(seconds), 1),
            "all_ms": [round(1e3 * s, 1) for s in seconds],
        }
        for kind, seconds in kinds.items()
    }
    result = {"load_average_1min": os.getloadavg()[0], "from_press_to_number": rows}
    path: Path = ROOT / ".artifacts" / f"latency-{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print("\nfirst answer, from press to changed number (load average "
          f"{result['load_average_1min']:.1f}):")  # fmt: skip
    for kind, row in rows.items():
        print(f"  {kind:28}{row['presses']:4} presses  median {row['median_ms']:6.0f} ms"
              f"  max {row['max_ms']:6.0f} ms")  # fmt: skip
