"""Rule files: read, previewed on a model, applied to it, taken back.

    rules = RuleSet.read("DeepSeek-V2-Lite-Chat.yaml")
    rules.preview(model)
    with rules.applied(model):
        ...

As in KTransformers the first rule that matches a module counts for it, and what lies below a module
is looked at in turn unless its rule says `recursive: False`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ktlab import html
from ktlab.checkpoint.embedded import data_path
from ktlab.errors import RuleError, nearest
from ktlab.kernels.computed import Computed
from ktlab.model.copies import let_go_unused, room
from ktlab.model.model import Model
from ktlab.model.place import apply_placement
from ktlab.model.place_seats import StandIn
from ktlab.model.settings import Change, ask
from ktlab.model.settings import apply as set_words
from ktlab.placement.placement import Placement
from ktlab.placement.rules.effects import Effect, set_on
from ktlab.placement.rules.modules import Module, modules
from ktlab.placement.rules.own import Classes, by_name
from ktlab.placement.rules.places import PLACEABLE, Placed, devices_of, placed, unplaceable
from ktlab.placement.rules.preview import NOTHING, Preview, counted
from ktlab.placement.rules.reading import LIMIT_BYTES, Problem, Rule, RuleProblems, read_rules
from ktlab.placement.rules.walk import Walk


@dataclass(frozen=True, kw_only=True, repr=False)
class RuleSet:
    """The rules of one file, in its order; comparable, never changed."""

    source: str
    rules: tuple[Rule, ...]

    @classmethod
    def read(
        cls, path: str | PathLike[str], *, classes: Classes = (), model: Model | None = None
    ) -> "RuleSet":
        """A file, or one that comes with the kit by its name, such as "cpu-experts".

        `classes`: your own that the file may name, `model`: for errors (see `parse`).
        Raises `RuleError` with everything that is wrong, by line and column.
        """
        file = Path(path).expanduser()
        if not file.exists() and file.name == str(path):
            own = {each.stem: each for each in sorted(data_path("rules").glob("*.yaml"))}
            if file.name not in own:
                raise RuleError(
                    f"{path}: there is no such rule file; expected a path, or one of "
                    f"{', '.join(own)}{nearest(file.name, own)}"
                )
            file = own[file.name]
        try:
            with open(file, "rb") as opened:
                data = opened.read(LIMIT_BYTES + 1)
        except OSError as error:
            raise RuleError(f"{path}: {error.strerror}; expected a YAML file of rules") from error
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RuleError(
                f"{path}: not text in UTF-8 ({error.reason} at byte {error.start}); expected YAML"
            ) from error
        return cls.parse(text, file.name, classes=classes, model=model)

    @classmethod
    def parse(
        cls,
        text: str,
        source: str = "rules",
        *,
        classes: Classes = (),
        model: Model | None = None,
    ) -> "RuleSet":
        """The rules of a text; `source` names it in messages.

        `classes` are your own, such as `[MyRouter]` or {name: class}, that `replace: {class:
        MyRouter}` puts in the place of a router, a layer's experts or an attention; `kwargs` are
        its attributes, or what its `__init__` takes. What it does not define is the replaced
        stage's. Nothing is imported because a text names it.

        Raises `RuleError` with everything that is wrong. With a `model` that is also what `preview`
        would tell of the sound rules among others: which do nothing on it, and devices that no
        placement knows.
        """
        rules, problems = read_rules(text, source, by_name(classes))
        found, note = cls(source=source, rules=rules), ""
        if problems and rules and model is None:
            sound = "1 rule is" if len(rules) == 1 else f"{len(rules)} rules are"
            note = f"{sound} sound; what they match was not looked at: model= looks, too"
        elif problems and model is not None:
            problems += found._idle(model)
        if problems:
            raise RuleProblems(source, problems, note)
        return found

    def preview(
        self,
        model: Model,
        *,
        strict: bool = False,
        stand_in: StandIn | None = None,
        dtype: str | None = None,
    ) -> Preview:
        """What each rule would do; nothing changes. The words are those of `apply`."""
        return self._previewed(model, *self._walk(model, stand_in, dtype), strict)

    def placement(
        self, model: Model, *, default: str | None = None, as_written: bool = False
    ) -> Placement:
        """Where the rules put each component, decode and prefill apart.

        As KTransformers runs a file: what no rule matches is on `default` (cuda:0 where a GPU is
        named at all, else cpu), and prefill_device counts where prompts go layer by layer;
        `as_written=True` takes it at its word. A component whose parts are put apart is where most
        of its weights are; the preview tells. Raises `RuleError` for an xpu, npu or musa.
        """
        walk = Walk.over(modules(model), self.rules, self.source)
        found = placed(walk, model, default, as_written).placement
        assert found is not None
        return found

    def apply(
        self,
        model: Model,
        *,
        strict: bool = False,
        stand_in: StandIn | None = None,
        dtype: str | None = None,
        progress: Callable[[float, float], None] | None = None,
    ) -> Change:
        """Set it on the model, live: nothing is reloaded. Returns what can be undone by `.undo()`.

        Where all devices that the rules put something on are there, or have a `stand_in`
        ({"cuda:0": "cpu"}, as `Model.place`), the model is placed so; else it stays where it is,
        and `preview` tells of each device that is asked for. `dtype` is `Model.place`'s: "int4" for
        the 4 bits of Marlin's operators.

        Raises `RuleError` before anything changes where experts in another format do not fit, and
        with all that is wrong of classes of your own, which are tried on two tokens first.
        `strict=True` refuses, before anything changes, rules that ask for what is not done here:
        devices that are not there, and words without a counterpart. `progress` is called with
        (done, total) in bytes while experts change their format.
        """
        walk, places = self._walk(model, stand_in, dtype)
        if wrong := walk.wrong():
            raise RuleError(
                f"{self.source}: nothing was changed on {model.name}\n  " + ";\n  ".join(wrong)
            )
        if strict:
            self._previewed(model, walk, places, strict)
        self._check_memory(model, sum(found.new_bytes for _, found in walk.changes()))
        total = sum(_requantized_bytes(*each) for each in walk.changes())
        done, change = 0, Change()
        try:
            for module, found in walk.changes():
                if progress is not None and total:
                    progress(done, total)
                done += _requantized_bytes(module, found)
                _set(model, change, module, found)
            if progress is not None and total:
                progress(total, total)
            if walk.all_there and places.placement != _present(model):
                assert places.placement is not None
                wanted = places.placement
                apply_placement(model, change, wanted, stand_in=stand_in, dtype=dtype)
        except BaseException:
            change.undo()
            raise
        return change

    @contextmanager
    def applied(
        self,
        model: Model,
        *,
        strict: bool = False,
        stand_in: StandIn | None = None,
        dtype: str | None = None,
    ) -> Iterator[Model]:
        """`apply` for the length of a `with`; everything is restored on leaving, and copies that
        took much are let go."""
        change = self.apply(model, strict=strict, stand_in=stand_in, dtype=dtype)
        try:
            yield model
        finally:
            change.undo()
            del change  # which still holds what was there meanwhile
            let_go_unused(model)

    def _idle(self, model: Model) -> list[Problem]:
        """Rules that match nothing or come too late, and devices that no placement knows."""
        try:
            preview = self.preview(model)
        except RuleProblems as error:
            return list(error.problems)
        at = {rule.number: rule.at for rule in self.rules}
        nothing = [
            (*at[row.rule], f"rule {row.rule} matches nothing: {row.note}")
            for row in preview.rows
            if row.status == NOTHING
        ]
        late = [
            (*at[number], f"rule {number} comes too late, earlier ones take all of it")
            for number in preview.late
        ]
        unplaced = [
            (*rule.at, f"rule {rule.number} asks for {', '.join(found)}: {PLACEABLE}")
            for rule in self.rules
            if (found := unplaceable(rule))
        ]
        return [*nothing, *late, *unplaced]

    def _check_memory(self, model: Model, needed: int) -> None:
        free = room(model)
        if free is not None and needed > free:
            raise RuleError(
                f"{self.source}: the experts of {model.name} in another format need "
                f"{html.byte_size(needed)} of memory, {html.byte_size(needed - free)} more than is "
                "free beside the model; name fewer layers, or a format with fewer bits"
            )

    def _walk(
        self, model: Model, stand_in: StandIn | None, dtype: str | None
    ) -> tuple[Walk, Placed]:
        walk = Walk.over(modules(model), self.rules, self.source)
        walk.try_own(model)
        try:
            places = placed(walk, model, None, False)
        except RuleError as error:
            return walk, Placed(placement=None, notes=(str(error),))
        assert places.placement is not None
        gpus = {f"cuda:{n}" for n in range(torch.cuda.device_count())}
        if {*places.placement.devices} <= {"cpu", *gpus, *model.seats, *(stand_in or ())}:
            formats = {word: seat.format for word, seat in model.seats.items()}
            formats = {
                word: dtype or formats.get(word, "bf16")
                for word in places.placement.devices
                if word.startswith("cuda:")
            }
            walk.move(devices_of(places.seats, _present(model)), places.where, formats)
        return walk, places

    def _previewed(self, model: Model, walk: Walk, places: Placed, strict: bool) -> Preview:
        found = Preview(
            source=self.source, model=model.name, rules=len(self.rules), rows=tuple(walk.rows()),
            placement=places.placement, notes=places.notes,
        )  # fmt: skip
        if strict and found.missing:
            lines = [f"{counted('rule', at)}: {what}" for what, at in found.missing.items()]
            raise RuleError(
                f"{self.source} asks for what is not done here on {model.name}; without strict the "
                "rest is applied\n  " + ";\n  ".join(lines)
            )
        return found

    def __repr__(self) -> str:
        lines = "\n".join(f"  {rule}" for rule in self.rules)
        return f"RuleSet({self.source}, {len(self.rules)} rules)\n{lines}"

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        rows = [
            (
                rule.number,
                rule.name or "",
                rule.match_class or "",
                rule.class_name,
                ", ".join(f"{key} {value}" for key, value in rule.kwargs.items()),
            )
            for rule in self.rules
        ]
        headers = ("rule", "name", "class", "becomes", "with")
        return html.mimebundle(repr(self), html.card(self.source, html.table(rows, headers)))


def _present(model: Model) -> Placement:
    """Where the model is now."""
    if model.placement is None:
        return Placement.everywhere(model.config)
    found: Placement = model.placement.placement
    return found


def _requantized_bytes(module: Module, found: Effect) -> int:
    return sum(p.nbytes for p in set_on(module)) if "format" in found.words else 0


def _set(model: Model, change: Change, module: Module, found: Effect) -> None:
    """The same switches as by hand, one module's at a time."""
    words, layer = dict(found.words), module.layer
    if found.stage is not None:
        change.set(module.block, module.kind, found.stage())
        return
    if count := words.pop("deferred", None):
        change.set(module.block, "deferred", int(count))
    if form := words.pop("form", None):
        assert layer is not None
        set_words(model, change, attention={layer: form})
        return
    products: tuple[Computed, ...] = tuple(set_on(module))
    if format := words.pop("format", None):
        assert layer is not None
        set_words(model, change, format={layer: format})
        products = (model.experts.by_layer[layer],)
    for product in products:
        ask(change, product, **words)
