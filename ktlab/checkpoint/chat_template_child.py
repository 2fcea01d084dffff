"""Renders one chat template in a process of its own, which may be stopped at any moment.

    python -I chat_template_child.py < {"source": ..., "context": {...}, "limits": {...}} > answer

A template is a program that came with a download. Jinja's sandbox keeps it from objects that it
should not reach; what the sandbox cannot do is stop a loop or a text that doubles, so this process
takes limits of processor time and memory from the operating system and dies of them. Only the
standard library and jinja2 are imported here.

The environment and the helpers are those of transformers' apply_chat_template
(utils/chat_template_utils.py), so that templates mean the same.
"""

import json
import resource
import sys
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Raised(Exception):
    """The template called raise_exception: its own words for what it cannot do."""


class TooLong(Exception):
    """More output than allowed."""


class Strict(ImmutableSandboxedEnvironment):
    """Refuses an unsafe attribute when it is named, not only when it is used."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(
            f"access to attribute {attribute!r} of {type(obj).__name__!r} is not allowed"
        )


class Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's part; here it is plain."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def raise_exception(message: str) -> NoReturn:
    raise Raised(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter would escape <, > and & for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def environment() -> ImmutableSandboxedEnvironment:
    made = Strict(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = strftime_now
    return made


def render(source: str, context: dict[str, Any], most_characters: int) -> str:
    pieces, length = [], 0
    for piece in environment().from_string(source).generate(**context):
        length += len(piece)
        if length > most_characters:
            raise TooLong(f"it wrote more than {most_characters:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def answer(request: dict[str, Any]) -> dict[str, str]:
    limits = request["limits"]
    for kind, most in ((resource.RLIMIT_CPU, "cpu_s"), (resource.RLIMIT_AS, "memory_bytes")):
        resource.setrlimit(kind, (limits[most], limits[most]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        return {"text": render(request["source"], request["context"], limits["characters"])}
    except Raised as error:
        return {"error": "raised", "message": str(error)}
    except SecurityError as error:
        return {"error": "sandbox", "message": str(error)}
    except TemplateSyntaxError as error:
        return {"error": "syntax", "message": f"line {error.lineno}: {error.message}"}
    except (TooLong, OverflowError) as error:  # "range too big" is an OverflowError
        return {"error": "limit", "message": str(error)}
    except (MemoryError, RecursionError) as error:
        return {"error": "limit", "message": f"it ran out of room ({type(error).__name__})"}
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        return {"error": "failed", "message": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    print(json.dumps(answer(json.load(sys.stdin))))
