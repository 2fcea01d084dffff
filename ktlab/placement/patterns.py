"""Regular expressions that somebody else wrote, searched for in names, and given up in time.

A rule file is a download, and `(a+)+$` may backtrack for longer than anybody waits. Python's `re`
says whether a text is a pattern, since that is what KTransformers and we are written for; `regex`
searches, because it can be told to stop.
"""

import re
from time import thread_time

import regex

from ktlab.errors import SettingError

LIMIT_S = 1.0
"""Of processor time, for one search, and for all slow ones of a pattern together. One of
KTransformers' takes some microseconds for a name."""
SLOW_S = 1e-4

PATTERN_ERRORS = (re.error, regex.error, OverflowError, RecursionError)
"""What `Pattern` raises for a text that is none."""


class SlowPatternError(SettingError):
    """A pattern that would take too long."""


class Pattern:
    """A compiled pattern; `search` raises `SlowPatternError`, from then on at once."""

    def __init__(self, text: str) -> None:
        re.compile(text)
        self._text, self._left_s = text, LIMIT_S
        self._compiled = regex.compile(text, regex.VERSION0)

    def search(self, name: str) -> bool:
        """Whether it is found anywhere in a name."""
        begun = thread_time()
        try:
            if self._left_s <= 0:
                raise TimeoutError
            found = self._compiled.search(name, timeout=self._left_s) is not None
        except TimeoutError:
            self._left_s = 0.0
            raise SlowPatternError(
                f"{self._text} takes more than {LIMIT_S:g} s to look for in {name!r}: it tries "
                "the same text again and again, as a repeat inside a repeat does; write it "
                "without, or search for less"
            ) from None
        spent = thread_time() - begun
        self._left_s -= spent if spent > SLOW_S else 0.0
        return found
