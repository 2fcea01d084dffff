"""Settings as they are typed: NAME=VALUE words, for the command line and the chat."""

import ast
from collections.abc import Sequence
from typing import Any

from ktlab.errors import KtlabError, SettingError, nearest

RULES = ("FixedK", "RelativeThreshold", "CumulativeProbability")
EXAMPLES = (
    "such as top_k=6, top_k={3:6,4:4}, attention=naive, quantize=q4_0, "
    "rule=RelativeThreshold(0.2), mask={3:[0,1]}"
)


def settings(words: Sequence[str]) -> dict[str, Any]:
    """Overrides from NAME=VALUE words: Python literals, names, or a selection rule."""
    changes: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.strip().rstrip(",").partition("=")
        if not equals or not name.isidentifier():
            raise SettingError(f"{word!r}: expected NAME=VALUE, {EXAMPLES}")
        changes[name] = _value(name, value)
    return changes


def _value(name: str, text: str) -> Any:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
            return _rule(name, tree)
        return ast.literal_eval(tree)
    except (SyntaxError, ValueError) as error:
        if isinstance(error, KtlabError):
            raise
        return text  # a bare word such as naive or q4_0


def _rule(name: str, call: ast.Call) -> Any:
    assert isinstance(call.func, ast.Name)
    if call.func.id not in RULES:
        raise SettingError(
            f"{name}={call.func.id}(...): unknown selection rule, expected one of "
            f"{', '.join(RULES)}{nearest(call.func.id, RULES)}"
        )
    from ktlab.routing import rules  # here, so that `ktlab --help` need not wait for torch

    try:
        positional = [ast.literal_eval(argument) for argument in call.args]
        named = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
        return getattr(rules, call.func.id)(*positional, **named)
    except (TypeError, ValueError) as error:
        raise SettingError(f"{name}={call.func.id}(...): {error}") from error
