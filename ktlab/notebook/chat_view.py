"""The chat of notebook 00: the same conversation as `ktlab chat`, in a cell."""

import threading
from dataclasses import dataclass
from functools import partial
from html import escape
from time import perf_counter
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from ktlab import html
from ktlab.chat.commands import Ask, Leave, run_command
from ktlab.chat.session import ChatSession
from ktlab.errors import KtlabError
from ktlab.notebook.css import style
from ktlab.notebook.instrument import Instrument, Snapshot

if TYPE_CHECKING:
    from ktlab.model.model import Model

REFRESH_S = 0.05
"""The page is told at most so often: a small model writes faster than anybody reads."""


@dataclass
class Turn:
    """One exchange as it is shown."""

    question: str
    answer: str = ""
    cost: str = ""
    remark: bool = False
    """A slash command and what it said: no part of the conversation."""


class ChatView(Instrument):
    """Type and press Enter. `chat` is the session behind it; `ask(text)` types for you.

    The experts slider acts from the next token on, also in the middle of an answer. `options` are
    those of `ChatSession`.
    """

    title = "Chat"

    def __init__(self, model: "Model", **options: Any) -> None:
        super().__init__(model)
        self.chat = ChatSession(self.model, **options)
        self.turns: list[Turn] = []
        self._stop = threading.Event()
        trained, most = model.config.top_k, model.config.selectable_experts
        kind = "your question" if self.chat.template is not None else "a text to continue"
        self.entry = widgets.Text(placeholder=f"{kind}, or /help; Enter sends")
        self.entry.add_class("kt-chat-entry")
        self.send_button = widgets.Button(
            description="send", icon="paper-plane", layout={"width": "auto"}
        )
        self.stop_button = widgets.Button(description="stop", icon="stop", layout={"width": "auto"})
        self.clear_button = widgets.Button(
            description="clear", icon="eraser", layout={"width": "auto"}, tooltip="forget it all"
        )
        self.experts = widgets.IntSlider(
            value=trained, min=1, max=min(most, 2 * trained), description="experts",
            continuous_update=False,
        )  # fmt: skip
        self.transcript = widgets.HTML()
        # Text has no event of its own for Enter; its `value` also changes when it is left.
        self.entry.on_msg(lambda _, content, __: self._message(content))
        self.send_button.on_click(lambda _: self.send())
        self.stop_button.on_click(lambda _: self._stop.set())
        self.clear_button.on_click(lambda _: self.ask("/clear"))
        self.experts.observe(lambda change: self._switch(int(change["new"])), "value")
        typing = widgets.HBox([self.entry, self.send_button, self.stop_button])
        below = widgets.HBox([self.experts, self.clear_button])
        for row in (typing, below):
            row.add_class("kt-controls")
        self.body.children = [self.transcript, typing, below]
        self.note = self._fullness()
        self._show()
        self._on_busy(False)

    # Talking ---------------------------------------------------------------------------------

    def send(self) -> None:
        """Ask what is typed."""
        text, self.entry.value = self.entry.value, ""
        if text.strip():
            self.ask(text)

    def ask(self, text: str) -> None:
        """Ask, or carry out a command; what is being answered stops and stays as far as it came."""
        self._stop.set()
        self._stop = threading.Event()
        self.submit(partial(self._run, text, self._stop), "answering")

    def _message(self, content: dict[str, Any]) -> None:
        if content.get("event") == "submit":
            self.send()

    def _switch(self, top_k: int) -> None:
        with self.worker.lock:
            self.chat.model.set(top_k=top_k)

    def _run(self, text: str, stop: threading.Event, replaced: threading.Event) -> None:
        turn = Turn(question=text)
        self.turns.append(turn)
        try:
            if text.startswith("/"):
                try:
                    self._command(turn)
                    return
                except Ask as asks:
                    turn.remark, turn.question = False, asks.text
            self._answer(turn, stop)
        except KtlabError:
            self.turns.remove(turn)
            self.publish(replaced, lambda: setattr(self.entry, "value", text))  # nothing is lost
            raise
        finally:
            self.publish(replaced, self._show)

    def _command(self, turn: Turn) -> None:
        turn.remark = True
        try:
            turn.answer = run_command(self.chat, turn.question)
        except Leave:
            turn.answer = "this cell stays; close the notebook to leave"
        if turn.question.startswith("/clear"):
            self.turns[:] = [turn]
        rules = {getattr(block.router.rule, "k", 0) for block in self.chat.model.moe_blocks}
        if len(rules) == 1 and self.experts.min <= (k := rules.pop()) <= self.experts.max:
            self.experts.value = k
        self.note = self._fullness()

    def _answer(self, turn: Turn, stop: threading.Event) -> None:
        shown = 0.0
        for token in self.chat.ask(turn.question, cancel=stop, on_prefill=self._reading):
            turn.answer += token.text
            if perf_counter() - shown > REFRESH_S:
                with self.worker.lock:
                    self._show()
                shown = perf_counter()
        assert self.chat.last is not None
        turn.answer, turn.cost = self.chat.last.text, str(self.chat.last)
        self.note = self._fullness()

    def _reading(self, done: int, total: int) -> None:
        with self.worker.lock:
            self.status.value = (
                f'<span class="kt-busy">reading {done:,} of {total:,} tokens …</span>'
            )

    # Showing ---------------------------------------------------------------------------------

    def _fullness(self) -> str:
        continues = (
            "" if self.chat.template is not None else ", no chat template: it continues text"
        )
        return (
            f"{self.model.name}{continues}; {self.chat.used_tokens:,} of {self.chat.context:,} "
            "tokens of context used"
        )

    def _show(self) -> None:
        self.transcript.value = style("chat_view") + transcript_html(self.turns)

    def to_html(self) -> str:
        with self.worker.lock:
            shown = html.Raw(style("chat_view") + transcript_html(self.turns))
            return html.card(f"{self.title}: {self.note}", shown)

    def snapshot(self) -> Snapshot:
        self.wait()
        plain = "\n".join(f"> {t.question}\n{t.answer}\n[{t.cost}]" for t in self.turns)
        return Snapshot(self.to_html(), plain=plain or self.title)


def transcript_html(turns: list[Turn]) -> str:
    """Questions on the right, answers on the left, below each what it cost."""
    parts = []
    for turn in turns:
        if turn.remark:
            said = f"{escape(turn.question)}\n{escape(turn.answer)}"
            parts.append(f'<div class="remark">{said}</div>')
            continue
        parts.append(f'<div class="you">{escape(turn.question)}</div>')
        parts.append(f'<div class="model">{escape(turn.answer)}</div>')
        parts.append(f'<div class="cost">{escape(turn.cost)}</div>' if turn.cost else "")
    body = "".join(parts) or '<div class="empty">Nothing has been said yet.</div>'
    return f'<div class="kt-chat"><div class="turns">{body}</div></div>'
