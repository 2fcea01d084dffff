"""The chat cell without a browser: it answers, keeps what was typed, and leaves the model alone."""

import time

import pytest

from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.model import generation
from ktlab.model.model import Model
from ktlab.notebook.chat_view import ChatView
from ktlab.routing.rules import FixedK


@pytest.fixture
def view():
    made = ChatView(
        Model(synthesize(TINY_TEST_CONFIG)), max_new_tokens=8, temperature=0.0, context=200
    )
    yield made
    made.close()


def press_enter(view: ChatView, text: str) -> ChatView:
    view.entry.value = text
    view.entry._handle_custom_msg({"event": "submit"}, [])
    assert view.wait(60)
    return view


def test_enter_asks_and_the_cost_is_shown(view: ChatView) -> None:
    press_enter(view, "Hello <b>")
    assert view.entry.value == "" and view.error == ""
    assert view.chat.last is not None and view.turns[0].answer == view.chat.last.text
    assert (
        "Hello &lt;b&gt;" in view.transcript.value and "tokens/s · one run" in view.transcript.value
    )
    assert "4 experts, as trained" in view.transcript.value
    assert "of 200 tokens of context used" in view.status.value
    press_enter(view, "more")
    assert view.turns[1].cost.count("cached") == 1 and len(view.turns) == 2
    assert "> Hello <b>" in repr(view.snapshot()) and "Hello &lt;b&gt;" in view.to_html()


def test_the_slider_and_the_command_switch_experts(view: ChatView) -> None:
    view.experts.value = 2
    press_enter(view, "one")
    assert "2 experts, trained with 4" in view.turns[-1].cost
    press_enter(view, "/experts 3")
    assert view.experts.value == 3 and view.turns[-1].remark
    assert view.chat.model.moe_blocks[0].router.rule == FixedK(3)
    assert view.model.moe_blocks[0].router.rule == FixedK(4)
    view.clear_button.click()
    assert view.wait(60) and [turn.question for turn in view.turns] == ["/clear"]
    assert view.chat.used_tokens == 0


@pytest.mark.parametrize(
    ("text", "expected"), [("x" * 300, "the context is full"), ("/expert 6", "no /expert")]
)
def test_what_fails_is_given_back(text: str, expected: str, view: ChatView) -> None:
    press_enter(view, text)
    assert expected in view.status.value and view.entry.value == text and not view.turns
    press_enter(view, "fine")
    assert view.error == "" and len(view.turns) == 1


def test_stop_and_another_question(view: ChatView, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object, **__: object) -> int:
        """Neither the end nor, before the reader looks, the last token, on any processor."""
        time.sleep(0.01)
        return ord("a")

    monkeypatch.setattr(generation, "sample", slow)
    view.chat.max_new_tokens = 150
    view.ask("one")
    while not view.turns or not view.turns[0].answer:
        time.sleep(0.005)
    view.stop_button.click()
    assert view.wait(60) and "stopped by you" in view.turns[0].cost
    press_enter(view, "/clear")
    view.ask("two")
    while len(view.turns) < 2 or not view.turns[1].answer:
        time.sleep(0.005)
    view.ask("three")
    assert view.wait(60)
    assert [turn.question for turn in view.turns] == ["/clear", "two", "three"]
    assert "stopped by you" in view.turns[1].cost and view.turns[2].cost
