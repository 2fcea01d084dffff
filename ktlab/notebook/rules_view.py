"""The live view of notebook 07: rules as text, what they would do, what they cost once applied."""

import re
import threading
from collections.abc import Mapping
from functools import partial
from html import escape
from time import perf_counter
from typing import TYPE_CHECKING

import ipywidgets as widgets
import torch

from ktlab import html
from ktlab.checkpoint.embedded import data_path
from ktlab.errors import RuleError
from ktlab.measurement.pace import pace
from ktlab.measurement.quality import Quality, stream_quality
from ktlab.measurement.tokens import BaselineCache
from ktlab.notebook.css import style
from ktlab.notebook.instrument import Instrument, Snapshot, numbers
from ktlab.notebook.rules_tables import preview_html, problems_html
from ktlab.placement.rules import Preview, RuleSet
from ktlab.placement.rules.own import Classes, by_name

if TYPE_CHECKING:
    from ktlab.model.model import Model
    from ktlab.model.settings import Change

MOST_TOKENS, LEAST_TOKENS, READ_S = 1024, 96, 8.0
"""Read under applied rules: as many tokens as this model reads in so many seconds."""
PATIENCE_S = 2 * READ_S
"""A class of the user's may be slow: after so long no other window is begun."""
OWN_TEXT = "your own rules"
_CODE = re.compile(r"#[0-9a-f]{4}\b")
"""Tells two definitions of a class apart; here one would only wonder."""


class Replaced(Exception):
    """Another request came while rules were being applied: all is undone."""


class RulesView(Instrument):
    """Edit rules: `preview` says what they would do. Applied to `model`, they give `quality`.

    `rules` are texts to start from, by name, before those that come with the kit; `classes` your
    own that they may name.
    """

    title = "Rules: what would they do, and what does it cost?"

    def __init__(
        self,
        model: "Model",
        texts: Mapping[str, str],
        *,
        rules: Mapping[str, str] | None = None,
        classes: Classes = (),
    ) -> None:
        super().__init__(model)
        self.classes = by_name(classes)
        self.preview: Preview | None = None
        self.applied: RuleSet | None = None
        self.quality: Quality | None = None
        self._plain = model.clone()
        self._change: Change | None = None
        self._baseline = BaselineCache()
        self._texts = dict(texts)
        own = sorted(data_path("rules").glob("*.yaml"))
        given = {**(rules or {}), **{each.stem: each.read_text("utf-8") for each in own}}
        self._starts = {name: text.strip("\n") for name, text in given.items()}
        self._filling = False
        names = list(self._starts)
        self.start_choice = widgets.Dropdown(
            options=[*names, OWN_TEXT], value=names[0], description="start from"
        )
        self.start_choice.layout.width = "300px"
        first = "english" if "english" in texts else next(iter(texts))
        self.text_choice = widgets.Dropdown(options=list(texts), value=first, description="read")
        self.text_choice.layout.width = "230px"
        self.area = widgets.Textarea(value=self._starts[names[0]], continuous_update=False)
        self.area.layout = widgets.Layout(width="99%", height="190px")
        self.apply_button = widgets.Button(description="apply", button_style="primary")
        self.undo_button = widgets.Button(description="undo", disabled=True)
        for button in (self.apply_button, self.undo_button):
            button.layout.width = "90px"
        self.state, self.summary, self.table = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.stand_in_box = widgets.Checkbox(
            value=False, indent=False, description="the CPU stands in for GPUs"
        )
        self.stand_in_box.observe(lambda _: self.refresh(), "value")
        self.start_choice.observe(self._picked, "value")
        self.area.observe(self._edited, "value")
        self.text_choice.observe(lambda _: self.applied and self.apply(), "value")
        self.apply_button.on_click(lambda _: self.apply())
        self.undo_button.on_click(lambda _: self.undo())
        above = widgets.HBox([self.start_choice, self.text_choice])
        below = widgets.HBox([self.apply_button, self.undo_button, self.stand_in_box])
        for row in (above, below):
            row.add_class("kt-controls")
        self.body.children = [above, self.area, below, self.state, self.summary, self.table]
        self.refresh()

    # What the reader does --------------------------------------------------------------------

    def set(self, text: str) -> None:
        """Put rules in, as if typed."""
        self.area.value = text

    def refresh(self) -> None:
        """Read the rules and show what they would do; nothing changes."""
        self.submit(self._look, "reading")

    def apply(self) -> None:
        """Set them on `model`, instead of those that are set, and read a text under them."""
        self.submit(self._apply, "applying")

    def undo(self) -> None:
        """Take back what is set."""
        self.submit(self._take_back, "undoing")

    def _picked(self, change: Mapping[str, str]) -> None:
        if not self._filling and change["new"] in self._starts:
            self._filling = True
            try:
                self.area.value = self._starts[change["new"]]
            finally:
                self._filling = False
            self.refresh()

    def _edited(self, _: Mapping[str, str]) -> None:
        if self._filling:
            return
        self._filling = True
        try:
            self.start_choice.value = OWN_TEXT
        finally:
            self._filling = False
        self.refresh()

    # Working ---------------------------------------------------------------------------------

    def _rules(self) -> RuleSet:
        name = str(self.start_choice.value)
        return RuleSet.parse(str(self.area.value), name, classes=self.classes, model=self._plain)

    def _stand_in(self, rules: RuleSet) -> dict[str, str] | None:
        """For the GPUs that the rules name and this machine does not have."""
        if not self.stand_in_box.value:
            return None
        named = rules.placement(self._plain).devices
        there = {f"cuda:{number}" for number in range(torch.cuda.device_count())}
        return {name: "cpu" for name in named if name not in ("cpu", *there)}

    def _look(self, cancel: threading.Event) -> None:
        try:
            rules = self._rules()
            preview = rules.preview(self._plain, stand_in=self._stand_in(rules))
        except RuleError as error:
            self.publish(cancel, partial(self._show_problems, error))
        else:
            self.publish(cancel, partial(self._show_preview, preview))

    def _apply(self, cancel: threading.Event) -> None:
        self._look(cancel)
        rules = self._rules()
        stand_in = self._stand_in(rules)
        if self._change is not None:
            self._change.undo()
            self._change = None

        def progress(done: float, total: float) -> None:
            if cancel.is_set():
                raise Replaced

        self._change = rules.apply(self.model, stand_in=stand_in, progress=progress)
        if not self.publish(cancel, partial(self._show_applied, rules)):
            return
        most = pace(self._plain).read(READ_S, MOST_TOKENS, least=LEAST_TOKENS)
        ids = self.model.tokenizer.encode(self._texts[str(self.text_choice.value)])[: most + 1]
        evaluation = stream_quality(
            self._plain, ids, a={}, b={"rules": rules, "stand_in": stand_in}, cancel=cancel,
            baseline=self._baseline, first=48,
        )  # fmt: skip
        start = perf_counter()
        for quality in evaluation:
            shown = self.publish(cancel, partial(self._show_quality, quality))
            if not shown or perf_counter() - start > PATIENCE_S:
                return

    def _take_back(self, cancel: threading.Event) -> None:
        if self._change is not None:
            self._change.undo()
            self._change = None
        self.publish(cancel, partial(self._show_applied, None))
        self._look(cancel)

    # Showing ---------------------------------------------------------------------------------

    def _show_preview(self, preview: Preview) -> None:
        self.preview = preview
        self.apply_button.disabled = False
        self.table.value = preview_html(preview)
        changes, missing = sum(row.count for row in preview.changes), len(preview.missing)
        self.note = f"{changes} modules would change" + (
            f"; {missing} wishes cannot be met here" if missing else ""
        )

    def _show_problems(self, error: RuleError) -> None:
        self.preview = None
        self.apply_button.disabled = True
        self.table.value = problems_html(error, str(self.area.value))
        self.note = "nothing can be done with these rules yet"

    def _show_applied(self, rules: RuleSet | None) -> None:
        self.applied, self.quality = rules, None
        self.undo_button.disabled = rules is None
        self.summary.value = ""
        said = escape(_CODE.sub("", str(self.model.settings)))
        self.state.value = f"applied: {escape(rules.source)} · model: {said}" if rules else ""

    def _show_quality(self, quality: Quality) -> None:
        self.quality = quality
        self.note = f"{quality.tokens:,} of {quality.total_tokens:,} tokens; {quality.method}"
        self.summary.value = numbers(self.figures(), preliminary=not quality.done)

    def figures(self) -> dict[str, object]:
        """What the applied rules cost, as numbers with intervals."""
        if self.quality is None:
            return {}
        if self.quality.identical:
            return {"KL divergence": "0: the same predictions, bit for bit"}
        return {
            "KL divergence": self.quality.kl_mean,
            "perplexity": f"× {self.quality.perplexity_ratio}",
            "same top-1": self.quality.top1_agreement,
        }

    def to_html(self) -> str:
        with self.worker.lock:
            return html.card(
                f"{self.title} · {self.start_choice.value}",
                html.Raw(style("instrument")),
                html.Raw(f'<div class="kt-text">{escape(str(self.area.value))}</div>'),
                html.Raw(f'<div class="s">{self.state.value}</div>{numbers(self.figures())}'),
                html.Raw(self.table.value),
                html.Raw(f'<div class="s">{escape(self.note)}</div>'),
            )

    def snapshot(self) -> Snapshot:
        self.wait()
        return Snapshot(self.to_html(), plain=repr(self))
