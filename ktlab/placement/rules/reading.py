"""From the text of a rule file to rules: YAML with line numbers, everything wrong with it at once.

The grammar is KTransformers' (optimize/optimize.py, gen_optimize_config): a list of
`match: {name, class}`, `replace: {class, kwargs}`, `recursive`. The text may come from anywhere, so
it is small, plain (no anchors, aliases or tags) and shallow before anything is built from it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml

from ktlab.errors import RuleError, nearest, short
from ktlab.placement.patterns import PATTERN_ERRORS, Pattern
from ktlab.placement.rules import vocabulary
from ktlab.placement.rules.modules import known_class, nearest_class
from ktlab.placement.rules.own import parameters, wrong_words

LIMIT_BYTES = 128 << 10
"""KTransformers' longest file has 20 KB."""
LIMIT_DEPTH = 10
LIMIT_PATTERN = 1000
LIMIT_PROBLEMS = 40
_SCALARS = ("str", "int", "float", "bool", "null")
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One entry of a file; `name` and `match_class` are None where they match everything."""

    number: int
    """From 1, in the order of the file."""
    line: int
    name: str | None
    """A regular expression, searched for anywhere in a module's name."""
    match_class: str | None
    """A dotted class."""
    replace_class: str
    """A dotted class, or "default"."""
    kwargs: Mapping[str, Any]
    recursive: bool
    """Whether the modules below a match are looked at, too."""
    own: type | None = None
    """The user's class that `replace_class` names."""
    at: tuple[int, int] = (1, 1)
    """Line and column of `name` in the file, else of the rule."""

    @property
    def kind(self) -> str:
        """What the replacement stands for: experts, matrix, attention, ..., default, own."""
        if self.own is not None:
            return vocabulary.OWN
        return vocabulary.replaces(self.replace_class) or ""

    @property
    def class_name(self) -> str:
        """The replacement's name without its module."""
        return self.replace_class.rpartition(".")[2]

    @property
    def own_words(self) -> dict[str, Any]:
        """What the user's class is made with: `kwargs` but for devices, unless it takes those."""
        taken = parameters(self.own) if self.own is not None else {}
        places = [name for name in vocabulary.PLACES if name not in taken]
        return {name: value for name, value in self.kwargs.items() if name not in places}

    @cached_property
    def _pattern(self) -> Pattern:
        return Pattern(self.name or "")  # asked of a hundred thousand modules: compiled once

    def named(self, module_name: str) -> bool:
        """Whether the regular expression is found in a module's name; SlowPatternError where that
        takes too long."""
        return self._pattern.search(module_name)

    def __str__(self) -> str:
        wanted = [f"name {self.name}"] if self.name is not None else []
        wanted += [f"class {self.match_class}"] if self.match_class is not None else []
        return f"rule {self.number} (line {self.line}): {', '.join(wanted)} -> {self.class_name}"


def read_rules(
    text: str, source: str, classes: Mapping[str, type] | None = None
) -> "tuple[tuple[Rule, ...], list[Problem]]":
    """The sound rules of a file's text, and everything that is wrong with the others; RuleError for
    what is no YAML.

    `classes` are the user's, by their names; a text never makes anything be imported.
    """
    size = len(text.encode("utf-8", errors="surrogatepass"))
    if size > LIMIT_BYTES:
        raise RuleError(
            f"{source}: {size:,} bytes; a rule file has at most {LIMIT_BYTES:,}. Is it one?"
        )
    reader = _Reader(classes=classes or {})
    try:
        reader.look_at(text)
        rules = () if reader.problems else reader.rules(yaml.compose(text, yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise RuleError(f"{source}: not YAML: {_words(error)}") from error
    return rules, reader.problems


Problem = tuple[int, int, str]
"""Line, column, words."""


class RuleProblems(RuleError):
    """All that is wrong with a file, by line and column; `note` comes last."""

    def __init__(self, source: str, problems: Sequence[Problem], note: str = "") -> None:
        self.problems = tuple(problems)
        shown = sorted(problems)[:LIMIT_PROBLEMS]
        lines = [f"line {line}, column {column}: {what}" for line, column, what in shown]
        if more := len(problems) - len(shown):
            lines.append(f"and {more} more")
        lines += [note] if note else []
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source}: {count}\n  " + ";\n  ".join(lines))


def _place(node: Any) -> tuple[int, int]:
    """Line and column where a node begins, from 1."""
    mark = getattr(node, "start_mark", None)
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)


def _words(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    what = " ".join(filter(None, (getattr(error, "context", ""), getattr(error, "problem", ""))))
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}"


Fields = dict[str, tuple[yaml.Node, yaml.Node]]


@dataclass
class _Reader:
    """Walks the nodes and collects what is wrong as (line, column, words)."""

    classes: Mapping[str, type]
    problems: list[Problem] = field(default_factory=list)

    def say(self, where: Any, what: str) -> None:
        self.problems.append((*_place(where), what))

    def look_at(self, text: str) -> None:
        """Refuse what could blow up, before anything is built from it."""
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                self.say(event, "anchors (&) and aliases (*) are not read here; write it out")
            if getattr(event, "tag", None) is not None:
                self.say(event, f"tags ({short(event.tag)}) are not read here")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > LIMIT_DEPTH:
                    self.say(event, f"nested more than {LIMIT_DEPTH} deep; a rule needs five")
                    return
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1

    def rules(self, root: yaml.Node | None) -> tuple[Rule, ...]:
        expected = "expected a list of rules, each with match and replace"
        if not isinstance(root, yaml.SequenceNode) or not root.value:
            self.say(root, f"{expected}; found {_kind(root)}")
            return ()
        found = [self.rule(i, node) for i, node in enumerate(root.value, 1)]
        return tuple(rule for rule in found if rule is not None)

    def rule(self, number: int, node: yaml.Node) -> Rule | None:
        here = len(self.problems)
        fields = self.fields(node, ("match", "replace", "recursive"), f"rule {number}")
        match = self.section(fields, "match", ("name", "class"), node, number)
        replace = self.section(fields, "replace", ("class", "kwargs", "device"), node, number)
        if "match" in fields and not match and len(self.problems) == here:
            self.say(fields["match"][1], f"rule {number}: match needs a name, a class, or both")
        name, match_class = self.pattern(match), self.text(match, "class")
        if match_class is not None and not known_class(match_class):
            self.say(
                match["class"][1],
                f"match class {short(match_class)} is unknown{nearest_class(match_class)}",
            )
        replace_class = self.text(replace, "class") or vocabulary.DEFAULT
        own = self.classes.get(replace_class) or self.classes.get(
            replace_class.removeprefix("__main__.")
        )
        kind = vocabulary.replaces(replace_class) if own is None else vocabulary.OWN
        if kind is None:
            self.say(
                replace["class"][1],
                f"replace class {short(replace_class, 90)} is unknown"
                f"{self.nearest_replacement(replace_class)}",
            )
        kwargs = self.kwargs(replace, kind, own)
        recursive = self.value(fields["recursive"][1]) if "recursive" in fields else True
        if not isinstance(recursive, bool):
            self.say(fields["recursive"][1], f"recursive is True or False, found {recursive!r}")
        if len(self.problems) > here:
            return None
        return Rule(
            number=number,
            line=node.start_mark.line + 1,
            name=name,
            match_class=match_class,
            replace_class=replace_class,
            kwargs=kwargs,
            recursive=bool(recursive),
            own=own,
            at=_place(match["name"][1] if "name" in match else node),
        )

    def fields(self, node: yaml.Node, known: tuple[str, ...], what: str) -> Fields:
        """{key: (key's node, value's node)} of a mapping whose keys are known words."""
        if not isinstance(node, yaml.MappingNode):
            self.say(node, f"{what}: expected {', '.join(known)}, found {_kind(node)}")
            return {}
        found: Fields = {}
        for key_node, value_node in node.value:
            key = key_node.value if key_node.tag == _TAG + "str" else None
            if not isinstance(key, str):
                self.say(key_node, f"{what}: expected words as keys, found {_kind(key_node)}")
            elif key in found:
                self.say(key_node, f"{what}: {key} stands here twice")
            elif key not in known:
                self.say(
                    key_node,
                    f"{what}: unknown key {short(key)}; expected {', '.join(known)}"
                    f"{nearest(key, known)}",
                )
            else:
                found[key] = (key_node, value_node)
        return found

    def section(
        self, fields: Fields, name: str, known: tuple[str, ...], node: yaml.Node, number: int
    ) -> Fields:
        if name in fields:
            return self.fields(fields[name][1], known, f"rule {number}, {name}")
        if isinstance(node, yaml.MappingNode):
            self.say(node, f"rule {number} has no {name}")
        return {}

    def text(self, fields: Fields, key: str) -> str | None:
        if key not in fields:
            return None
        value = self.value(fields[key][1])
        if isinstance(value, str) and value:
            return value
        self.say(fields[key][1], f"{key}: expected text, found {short(value)}")
        return None

    def pattern(self, match: Fields) -> str | None:
        pattern = self.text(match, "name")
        if pattern is None:
            return None
        if len(pattern) > LIMIT_PATTERN:
            self.say(
                match["name"][1],
                f"a regular expression of {len(pattern):,} characters; at most {LIMIT_PATTERN:,}",
            )
            return None
        try:
            Pattern(pattern)
        except PATTERN_ERRORS as error:
            what = getattr(error, "msg", error)
            node, position = match["name"][1], getattr(error, "pos", None)
            mark = node.start_mark
            column = mark.column + 1 + _written_before(node, position or 0)
            written = short(pattern)
            if pattern.isprintable():  # as it was typed: its backslashes are no escapes of Python's
                written = written.replace("\\\\", "\\")
            said = f"{written} is no regular expression: {what}"
            if position is not None:
                said += f", at character {position + 1}"
            self.problems.append((mark.line + 1, column, said))
        return pattern

    def nearest_replacement(self, name: str) -> str:
        """Where an unknown class might come from."""
        if "ktransformers" in name:
            return vocabulary.nearest_replacement(name)
        if near := nearest(name.removeprefix("__main__."), self.classes):
            return near
        return "; a class of your own is handed over: classes=[...] beside the file"

    def kwargs(self, replace: Fields, kind: str | None, own: type | None) -> dict[str, Any]:
        checks = vocabulary.keyword_arguments(kind or vocabulary.DEFAULT)
        given: Fields = {}
        if "kwargs" in replace and replace["kwargs"][1].tag != _TAG + "null":
            node = replace["kwargs"][1]
            if kind is None or kind == vocabulary.OWN:
                # Of an unknown class nobody knows the arguments either: one problem is enough.
                known = _keys(node)
            else:
                known = tuple(checks)
            given = self.fields(node, known, "kwargs")
        if "device" in replace:
            given["device"] = replace["device"]
        found = {}
        for key, (_, node) in given.items():
            found[key] = value = self.value(node)
            places = own is None or key not in parameters(own)
            if kind and places and key in checks and (wrong := checks[key](value)):
                self.say(node, f"{key}: {wrong}")
        if own is not None:
            words = {
                key: value
                for key, value in found.items()
                if key not in checks or key in parameters(own)
            }
            if wrong := wrong_words(own, words):
                self.say(replace["kwargs" if "kwargs" in replace else "class"][1], wrong)
        return found

    def value(self, node: yaml.Node) -> Any:
        """Plain Python: text, numbers, True, False, None, lists, dicts by text or number."""
        if isinstance(node, yaml.SequenceNode):
            return [self.value(each) for each in node.value]
        if isinstance(node, yaml.MappingNode):
            pairs = [(self.value(key), self.value(value)) for key, value in node.value]
            for key, (key_node, _) in zip((k for k, _ in pairs), node.value, strict=True):
                if not isinstance(key, (str, int)):
                    self.say(key_node, f"expected a word or a number as key, found {key!r}")
            return {key: value for key, value in pairs if isinstance(key, (str, int))}
        kind = node.tag.removeprefix(_TAG)
        if kind not in _SCALARS or (kind != "str" and len(node.value) > 40):
            self.say(node, f"expected text, a number, True or False, found {_kind(node)}")
            return None
        try:
            return yaml.SafeLoader("").construct_object(node)
        except ValueError:  # such as 0x_, which YAML's pattern for numbers lets through
            self.say(node, f"expected a number, found {_kind(node)}")
            return None


def _written_before(node: yaml.Node, position: int) -> int:
    """Characters of the file before one of a text's, as it is written on one line: with its quote
    and its escapes; 0, the beginning, where it runs over lines."""
    start, end = node.start_mark, node.end_mark
    written = (start.buffer or "")[start.pointer : end.pointer]
    quote = written[:1]
    if start.line != end.line or start.buffer is None:
        return 0
    if quote not in ("'", '"'):
        return position
    at = 1
    for _ in range(position):
        pair = written[at : at + 2]
        if quote == '"' and pair[:1] == "\\":
            at += 2 + {"x": 2, "u": 4, "U": 8}.get(pair[1:], 0)
        else:
            at += 2 if pair == "''" else 1
    return at


def _keys(node: yaml.Node) -> tuple[str, ...]:
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    return tuple(key.value for key, _ in pairs if isinstance(key.value, str))


def _kind(node: yaml.Node | None) -> str:
    """What stands there, for a message."""
    if node is None:
        return "nothing"
    if isinstance(node, yaml.ScalarNode):
        kind = node.tag.removeprefix(_TAG)
        return "nothing" if kind == "null" and not node.value else f"{kind} {short(node.value)}"
    return "an empty list" if not node.value else f"a {node.id}"
