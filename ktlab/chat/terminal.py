"""The chat in a terminal or a pipe: answers to standard output, remarks to standard error."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

from ktlab.chat.commands import Ask, Leave, run_command
from ktlab.chat.session import CHUNK, ChatSession
from ktlab.errors import KtlabError
from ktlab.model.model import Model
from ktlab.placement.rules import RuleSet
from ktlab.progress import ProgressBar

QUOTES = '"""'
PLAIN = "has no chat template (a base model): your text is continued, not answered"


def talk(
    chat: ChatSession,
    *,
    prompt: str = "> ",
    expand: Callable[[str], str | None] | None = None,
    unasked: str | None = None,
    stdin: TextIO | None = None,
) -> None:
    '''Read lines and answer them until the input ends or /quit.

    A line that begins with """ opens a text of several lines, which the next """ closes. `expand`
    may replace what was typed (an empty line by a prompt file); None ignores it. `unasked` is
    asked where the input is no terminal and ends before its first line.
    '''
    stdin = stdin or sys.stdin
    terminal = stdin.isatty()
    if terminal:
        _history()
    _remark(repr(chat.model).splitlines()[0])
    if chat.template is None:
        _remark(f"{chat.model.name} {PLAIN}")
    _remark(f"context {chat.context:,} tokens; /help lists commands")
    while True:
        try:
            text = _entered(prompt if terminal else "", stdin, terminal)
        except EOFError:
            if terminal:
                print(file=sys.stderr)
            elif unasked is not None:
                answer(chat, unasked)
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            _remark("\n/quit or Ctrl-D leaves")
            continue
        unasked = None
        try:
            question = expand(text) if expand is not None else text
            if not question or not question.strip():
                continue
            if question.startswith("/") and "\n" not in question:
                try:
                    _remark(run_command(chat, question))
                    continue
                except Ask as asks:
                    question = asks.text
            answer(chat, question)
        except Leave:
            return
        except BrokenPipeError:
            raise  # nobody reads the answers any more
        except (KtlabError, OSError) as error:  # OSError: a file that the line names
            _remark(f"ktlab: {error}")


def inject(rules: RuleSet, model: Model) -> None:
    """Apply a rule file, and say what it changed and what it asked for in vain."""
    for line in rules.preview(model).summary:
        _remark(line)
    rules.apply(model, progress=ProgressBar("experts in another format", sys.stderr))


def answer(chat: ChatSession, question: str) -> None:
    """One answer, streamed; Ctrl-C stops it, a second Ctrl-C leaves the program."""
    with interrupts() as cancel:
        if chat.force_think:
            print("<think>")
        for token in chat.ask(question, cancel=cancel, on_prefill=_prefill):
            print(token.text, end="", flush=True)
    print(flush=True)
    _remark(f"[{chat.last}]")


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; where signals cannot be had (threads), a plain one."""
    cancel = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    if threading.current_thread() is not threading.main_thread():
        yield cancel
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, before)


def _entered(prompt: str, stdin: TextIO, terminal: bool) -> str:
    text = _line(prompt, stdin, terminal)
    if not text.startswith(QUOTES):
        return text
    lines, rest = [], text[len(QUOTES) :]
    while not rest.endswith(QUOTES):
        lines.append(rest)
        try:
            rest = _line("... " if prompt else "", stdin, terminal)
        except EOFError:
            rest = QUOTES  # an open text ends with the input
    return "\n".join([*lines, rest[: -len(QUOTES)]]).strip("\n")


def _line(prompt: str, stdin: TextIO, terminal: bool) -> str:
    if terminal and stdin is sys.stdin:
        return input(prompt)
    line = stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def _history() -> None:
    """Arrow keys edit and recall, where Python was built with readline."""
    try:
        import readline  # noqa: F401
    except ImportError:
        pass


def _prefill(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[Kreading {done:,} of {total:,} tokens", end="", file=sys.stderr, flush=True)
        if done + CHUNK >= total:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _remark(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
