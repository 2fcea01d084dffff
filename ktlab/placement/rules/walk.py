"""Which rule takes which module, in the order in which KTransformers asks (gen_optimize_config)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ktlab.model.model import Model
from ktlab.placement.patterns import SlowPatternError
from ktlab.placement.rules import own
from ktlab.placement.rules.effects import Effect, effect, on_gpu
from ktlab.placement.rules.modules import Module
from ktlab.placement.rules.preview import (
    CHANGES,
    MISSING,
    NOTHING,
    SAME,
    SHADOWED,
    Row,
    collapsed,
    counted,
)
from ktlab.placement.rules.reading import Problem, Rule, RuleProblems


@dataclass
class Walk:
    """One pass over a model's modules; `Walk.over` makes it."""

    rules: Sequence[Rule]
    root: Module
    source: str
    """What messages call the rules."""
    taken: dict[int, list[tuple[Module, Effect]]] = field(default_factory=dict)
    """{rule: what it does to which modules}."""
    shadowed: dict[int, dict[str, int]] = field(default_factory=dict)
    """{rule: {module that it matches: the rule that came first}}."""
    slow: dict[int, Problem] = field(default_factory=dict)
    """{rule: that its regular expression takes too long}."""
    stops: list[tuple[str, Rule]] = field(default_factory=list)
    """Modules below which nothing was looked at."""
    all_there: bool = False
    """Whether every device that is asked for is there (`move`)."""

    @classmethod
    def over(cls, root: Module, rules: Sequence[Rule], source: str) -> "Walk":
        """Ask every rule about every module that is reached. RuleError with every regular
        expression that takes too long."""
        walk = cls(rules=rules, root=root, source=source)
        walk._look_at(root)
        walk._check_time()
        return walk

    def _matches(self, rule: Rule, module: Module) -> bool:
        """Whether class and name, where the rule gives them, are the module's."""
        if rule.match_class is not None and not module.is_a(rule.match_class):
            return False
        return self._named(rule, module)

    def _named(self, rule: Rule, module: Module) -> bool:
        if rule.number in self.slow:
            return False
        try:
            return rule.named(module.name)
        except SlowPatternError as error:
            self.slow[rule.number] = (*rule.at, f"rule {rule.number}: {error}")
            return False

    def _check_time(self) -> None:
        if self.slow:
            raise RuleProblems(self.source, list(self.slow.values()))

    def _look_at(self, module: Module) -> None:
        first = None
        for rule in self.rules:
            if not self._matches(rule, module):
                continue
            if first is None:
                first = rule
                self.taken.setdefault(rule.number, []).append((module, effect(rule, module)))
            else:
                self.shadowed.setdefault(rule.number, {})[module.name] = first.number
        if first is not None and not first.recursive:
            self.stops.append((module.name, first))
            return
        for child in module.below():
            self._look_at(child)

    def changes(self) -> Iterator[tuple[Module, Effect]]:
        """Modules on which something is set."""
        for rule in self.rules:
            yield from ((m, found) for m, found in self.taken.get(rule.number, ()) if found.sets)

    def move(
        self, before: Mapping[str, str], after: Mapping[str, str], formats: Mapping[str, str]
    ) -> None:
        """{module: device}: all devices are there, so that modules go where rules put them, to be
        in `formats` {GPU: format} there."""
        self.all_there = True
        for rule in self.rules:
            taken = self.taken.get(rule.number, [])
            for at, (module, found) in enumerate(taken):
                new = replace(found, away=())
                if (format := formats.get(after.get(module.name, ""))) is not None:
                    new = replace(new, missing=(*new.missing, *on_gpu(rule, module, format)))
                if module.name in after and before[module.name] != after[module.name]:
                    was, will = before[module.name], after[module.name]
                    new = replace(
                        new, moved=True, before=", ".join(filter(None, (found.before, was))),
                        after=", ".join(filter(None, (found.after or found.before, will))),
                    )  # fmt: skip
                taken[at] = (module, new)

    def wrong(self) -> list[str]:
        """Why classes of the user's cannot stand where rules put them, each with its places."""
        where: dict[tuple[int, str], list[str]] = {}
        for rule in self.rules:
            for module, found in self.taken.get(rule.number, ()):
                for what in found.wrong:
                    where.setdefault((rule.number, what), []).append(module.name)
        return [f"rule {n}, {collapsed(names)}: {what}" for (n, what), names in where.items()]

    def try_own(self, model: Model) -> None:
        """Run each class of the user's where it would stand first: what it returns must fit."""
        for rule in self.rules:
            taken, seen = self.taken.get(rule.number, []), dict[str, tuple[str, ...]]()
            for at, (module, found) in enumerate(taken):
                if found.stage is None or module.layer is None:
                    continue
                if module.kind not in seen:
                    seen[module.kind] = own.tried(found.stage, module.kind, model)
                if seen[module.kind]:
                    wrong = tuple(f"{rule.class_name}: {what}" for what in seen[module.kind])
                    taken[at] = (module, Effect(wrong=wrong))

    def rows(self) -> Iterator[Row]:
        """The table: rule by rule, modules that are alike together."""
        for rule in self.rules:
            alike: dict[tuple[Any, ...], list[str]] = {}
            new_bytes: dict[tuple[Any, ...], int] = {}
            for module, found in self.taken.get(rule.number, ()):
                missing = (*found.wrong, *found.away, *found.missing)
                changes = found.sets or found.moved
                status = CHANGES if changes else MISSING if missing else SAME
                key = (module.stage, status, found.before, found.after, missing, found.note)
                alike.setdefault(key, []).append(module.name)
                new_bytes[key] = new_bytes.get(key, 0) + found.new_bytes
            for key, names in alike.items():
                stage, status, before, after, absent, note = key
                yield _row(
                    rule, names, stage=stage, status=status, before=before, after=after,
                    missing=absent, note=note, new_bytes=new_bytes[key],
                )  # fmt: skip
            if taken_before := self.shadowed.get(rule.number):
                firsts = sorted(set(taken_before.values()))
                note = f"{counted('rule', firsts)} {'comes' if len(firsts) == 1 else 'come'} first"
                yield _row(rule, list(taken_before), status=SHADOWED, note=note)
            elif not alike:
                yield _row(rule, [], status=NOTHING, note=self._why_nothing(rule))

    @cached_property
    def _every(self) -> list[Module]:
        """Also what no rule was asked about."""
        return list(_below(self.root))

    def _why_nothing(self, rule: Rule) -> str:
        unseen = next((module for module in self._every if self._matches(rule, module)), None)
        if unseen is not None:
            stop = next(r for name, r in self.stops if unseen.name.startswith(f"{name}."))
            return f"{unseen.name} lies below what rule {stop.number} takes whole (recursive)"
        named = sum(self._named(rule, module) for module in self._every)
        self._check_time()
        if not named:
            return "no module here has such a name"
        of_class = (rule.match_class or "").rpartition(".")[2]
        if rule.name is None:
            return f"no module here is a {of_class}"
        return f"{named} modules here have such a name, none of them is a {of_class}"


def _below(module: Module) -> Iterator[Module]:
    yield module
    for child in module.below():
        yield from _below(child)


def _row(rule: Rule, names: Sequence[str], *, stage: str = "", **fields: Any) -> Row:
    return Row(
        rule=rule.number, line=rule.line, replacement=rule.class_name,
        modules=collapsed(names) or ("(the root)" if names else ""), count=len(names), stage=stage,
        **fields,
    )  # fmt: skip
