"""What ktlab raises: each message says what was expected, what was found, and what to do.

All of them are `ValueError` or `TypeError` subclasses, so that code which never heard of ktlab
can still catch them; `assert` is kept for our own invariants.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class KtlabError(ValueError):
    """Root of every error that ktlab raises on a user's input."""


class CheckpointError(KtlabError):
    """A file that is not what it says: not GGUF, truncated, lying about sizes, missing tensors."""


class FormatError(KtlabError):
    """A number format that is unknown, or that cannot do what was asked of it."""


class SettingError(KtlabError):
    """A switch (top_k, rule, attention form, backend, ...) set to something impossible."""


class PlacementError(SettingError):
    """A placement of another model, on devices that are not there, or with what cannot be."""


class ContextError(KtlabError):
    """A text that does not fit the context, or a context that does not fit the memory."""


class TraceError(KtlabError):
    """A trace asked for something it does not hold, or mixed with another model's."""


class RuleError(KtlabError):
    """A rule file that cannot be read, or that asks for what this model or machine cannot do."""


class StageError(KtlabError, AttributeError):
    """A stage that this layer does not have (a dense layer has no router).

    Also an `AttributeError`, because it is raised on attribute access and `hasattr` must work.
    """


def nearest(found: str, known: Iterable[str]) -> str:
    """'; did you mean "x"?' if a known name is close to `found`, in whatever case, else ''."""
    names: dict[str, list[str]] = {}
    for name in known:
        names.setdefault(name.lower(), []).append(name)
    if not (matches := get_close_matches(str(found).lower(), names, n=1)):
        return ""
    # Of names that differ in case alone, the one that is written most alike.
    (match,) = get_close_matches(str(found), names[matches[0]], n=1, cutoff=0.0)
    return f'; did you mean "{match}"?'


def short(value: object, limit: int = 60) -> str:
    """`repr(value)` for a message, cut where it is long."""
    shown = repr(value)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
