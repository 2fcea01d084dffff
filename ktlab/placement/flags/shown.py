"""How a command line is printed: as a shell takes it, in lines of a terminal."""

import shlex
import textwrap
from collections.abc import Iterable

WIDTH = 78
"""Columns, and two for the backslash."""


def shown(args: Iterable[str], left_out: Iterable[str]) -> str:
    """The arguments, going on in the next line where they are many; what they cannot say below."""
    lines = [""]
    for word in map(shlex.quote, args):
        if lines[-1].strip() and len(f"{lines[-1]} {word}") > WIDTH:
            lines.append("   ")
        lines[-1] += f" {word}"
    comments = (
        textwrap.fill(f"# left out: {what}", WIDTH, subsequent_indent="#   ") for what in left_out
    )
    return "\n".join([" \\\n".join(lines).lstrip(), *comments])
