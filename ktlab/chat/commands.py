"""What a line that begins with a slash does to a conversation, in the terminal and the notebook."""

import inspect
import shlex
from collections.abc import Callable
from pathlib import Path

from ktlab.chat.session import ChatSession
from ktlab.errors import KtlabError, SettingError, nearest
from ktlab.model.generation import check_sampling
from ktlab.model.words import EXAMPLES, settings


class CommandError(KtlabError):
    """A command that does not exist, or cannot do what was asked; nothing has changed."""


class Leave(Exception):
    """/quit"""


class Ask(Exception):
    """A command that asks the model something: /read."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


def run_command(chat: ChatSession, line: str) -> str:
    """Carry out one line that begins with "/"; returns what to show.

    Raises KtlabError with what was expected (nothing has changed then), `Leave`, or `Ask`.
    """
    word, _, rest = line.strip().partition(" ")
    action = COMMANDS.get(word.lower())
    if action is None:
        raise CommandError(
            f"there is no {word}{nearest(word, COMMANDS)}; /help lists what there is. A text that "
            "begins with a slash: put a space before it"
        )
    return action(chat, rest.strip())


def _experts(chat: ChatSession, value: str) -> str:
    """/experts K: routed experts a token, from the next token on; /experts alone tells"""
    trained = chat.model.config.top_k
    if value:
        chat.model.set(top_k=_whole("/experts", value))
    rules = {str(block.router.rule) for block in chat.model.moe_blocks} or {"no routed experts"}
    return f"{', '.join(sorted(rules))}; trained with {trained}" + (_cached(chat) if value else "")


def _set(chat: ChatSession, value: str) -> str:
    """/set NAME=VALUE ...: any switch, live, such as attention=naive"""
    words = _words("/set", value)
    if not words:
        raise CommandError(f"/set: expected NAME=VALUE, {EXAMPLES}")
    chat.model.set(**settings(words))
    return f"{chat.model.settings}{_cached(chat)}"


def _show(chat: ChatSession, value: str) -> str:
    """/show: every setting, and how full the context is"""
    return (
        f"{chat.model.settings}\n{chat!r}\nsystem: {chat.system or '(none)'}\n"
        f"temperature {chat.temperature:g}, top-p {chat.top_p:g}, at most "
        f"{chat.max_new_tokens:,} new tokens"
    )


def _system(chat: ChatSession, value: str) -> str:
    """/system TEXT: a new system message for this conversation; /system alone removes it"""
    chat.system = value
    return ("system message set" if value else "no system message") + (
        "; the history is read anew with the next question" if chat.messages else ""
    )


def _clear(chat: ChatSession, value: str) -> str:
    """/clear: forget the history; settings and system message stay"""
    chat.clear()
    return "history forgotten"


def _max(chat: ChatSession, value: str) -> str:
    """/max N: most new tokens of an answer"""
    number = _whole("/max", value)
    check_sampling(max_new_tokens=number, temperature=chat.temperature, top_p=chat.top_p)
    chat.max_new_tokens = number
    return f"at most {number:,} new tokens"


def _temperature(chat: ChatSession, value: str) -> str:
    """/temperature X: 0 is greedy"""
    try:
        number = float(value)
    except ValueError:
        raise CommandError(f"/temperature {value}: expected a number such as 0.6") from None
    check_sampling(max_new_tokens=chat.max_new_tokens, temperature=number, top_p=chat.top_p)
    chat.temperature = number
    return f"temperature {number:g}"


def _read(chat: ChatSession, value: str) -> str:
    """/read FILE: ask what a file says"""
    if not value:
        raise CommandError("/read: expected the name of a text file")
    try:
        raise Ask(Path(value).expanduser().read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise CommandError(f"/read: {value}: {error.strerror}") from error


def _help(chat: ChatSession, value: str) -> str:
    """/help: this list"""
    lines = (inspect.getdoc(action) or "" for action in COMMANDS.values())
    parts = (line.partition(": ") for line in lines)
    table = "\n".join(f"{name:22} {text}" for name, _, text in parts)
    return table + '\n"""                    begins and ends a text of several lines'


def _quit(chat: ChatSession, value: str) -> str:
    """/quit: leave; so does Ctrl-D"""
    raise Leave


COMMANDS: dict[str, Callable[[ChatSession, str], str]] = {
    "/experts": _experts,
    "/set": _set,
    "/show": _show,
    "/system": _system,
    "/clear": _clear,
    "/max": _max,
    "/temperature": _temperature,
    "/read": _read,
    "/help": _help,
    "/quit": _quit,
}


def _whole(command: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise CommandError(f"{command} {value}: expected a whole number") from None


def _words(command: str, value: str) -> list[str]:
    try:
        return shlex.split(value)
    except ValueError as error:
        raise SettingError(f"{command} {value}: {error}") from None


def _cached(chat: ChatSession) -> str:
    """A remark where the cache holds what another setting computed."""
    if not chat.used_tokens:
        return ""
    return (
        "; from the next token on, the history stays cached as it was computed (/clear starts anew)"
    )
