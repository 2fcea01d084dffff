"""The live view of notebook 03: take experts of a layer away and see what the text loses.

E experts, T tokens.
"""

import threading
from collections.abc import Mapping
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from ktlab import figures, html
from ktlab.measurement.pace import pace
from ktlab.measurement.quality import Quality, stream_quality
from ktlab.measurement.tokens import BaselineCache
from ktlab.notebook.css import style
from ktlab.notebook.excerpts import beginning
from ktlab.notebook.expert_choice import (
    ORDERS,
    continuations_html,
    loss_view,
    most_masked,
    pick,
)
from ktlab.notebook.instrument import Instrument, Snapshot, TextSource, live, numbers

if TYPE_CHECKING:
    from ktlab.model.generation import Generation
    from ktlab.model.model import Model
    from ktlab.routing.patterns import Histogram

MOST_TOKENS, LEAST_TOKENS, READ_S = 768, 96, 12.0
"""Read with a mask: as many tokens as this model reads in so many seconds."""
CONTINUATION, WRITE_S = 32, 5.0
PROMPT_CHARACTERS = 160
GONE = "rgba(213,94,0,0.6)"


class OffloadView(Instrument):
    """Mask experts of one layer: `quality` against the whole model, `before` and `after` loads.

    What an offloading scheme does that skips a missing expert instead of fetching it: the token
    takes its next best ones.
    """

    title = "What does an expert do? Take some away"

    def __init__(self, model: "Model", texts: Mapping[str, str]) -> None:
        super().__init__(model)
        self.quality: Quality | None = None
        self.before: Histogram | None = None
        self.after: Histogram | None = None
        self.masked: tuple[int, ...] = ()
        self.continuations: tuple[Generation, Generation] | None = None
        self._baseline = BaselineCache()
        self._whole: dict[tuple[str, int], Histogram] = {}
        self._plain: dict[str, Generation] = {}
        config = model.config
        most = most_masked(config.selectable_experts, config.top_k)
        self.source = TextSource(texts, self.refresh)
        layers = list(config.moe_layers)
        self.layer_choice = widgets.SelectionSlider(
            options=layers, value=layers[-1], description="layer", continuous_update=False
        )
        self.order_choice = widgets.Dropdown(
            options=ORDERS, value="hottest", description="take away"
        )
        self.order_choice.layout.width = "220px"
        self.count_slider = widgets.IntSlider(
            value=min(8, most), min=0, max=most, description="how many", continuous_update=False
        )
        self.expert_number = widgets.BoundedIntText(
            value=0, min=0, max=config.num_experts - 1, description="expert"
        )
        self.expert_number.layout.width = "150px"
        self.summary, self.text_html = widgets.HTML(), widgets.HTML()
        zero_E = [0.0] * config.num_experts
        self.bars = live(figures.router_histogram(zero_E, zero_E, height=240))
        self.bars.add_bar(x=self.bars.data[0].x, y=zero_E, marker={"color": GONE})
        names = ("whole model", "with experts taken away", "taken away")
        for trace, name in zip(self.bars.data, names, strict=True):
            trace.name = name
            trace.on_click(self._bar_clicked)
        changed = (self.layer_choice, self.order_choice, self.count_slider, self.expert_number)
        for control in changed:
            control.observe(lambda _: self.refresh(), "value")
        rows = [
            widgets.HBox([self.source.choice, self.layer_choice]),
            widgets.HBox([self.order_choice, self.count_slider, self.expert_number]),
        ]
        for row in rows:
            row.add_class("kt-controls")
        self.body.children = [*rows, self.source.area, self.summary, self.bars, self.text_html]
        self.refresh()

    @property
    def layer(self) -> int:
        return int(self.layer_choice.value)

    # Working ---------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Measure the present choice: loads at once, quality as it narrows, then a continuation."""
        self.expert_number.layout.display = "" if self.order_choice.value == "one" else "none"
        self.count_slider.layout.display = "none" if self.order_choice.value == "one" else ""
        self.submit(self._measure, "measuring")

    def _measure(self, cancel: threading.Event) -> None:
        layer, text, order = self.layer, self.source.text, str(self.order_choice.value)
        most = pace(self.model).read(READ_S, MOST_TOKENS, least=LEAST_TOKENS)
        ids = self.model.tokenizer.encode(text)[: most + 1]
        if (text, layer) not in self._whole:
            trace = self.model.trace(ids[:256])
            for index in trace.routing.layers:
                self._whole[text, index] = trace.routing.histogram(index)
        before = self._whole[text, layer]
        count = 1 if order == "one" else int(self.count_slider.value)
        masked = pick(before.load_E, order, count, first=int(self.expert_number.value))
        if not self.publish(cancel, lambda: self._show_loads(before, None, masked)):
            return
        change = {"mask": {layer: masked}} if masked else {}
        model = self.model.clone()
        with model.override(**change):
            after = model.trace(ids[: min(256, len(ids))]).routing.histogram(layer)
        if not self.publish(cancel, lambda: self._show_loads(before, after, masked)):
            return
        evaluation = stream_quality(
            self.model, ids, a={}, b=change, cancel=cancel, baseline=self._baseline, first=48
        )
        for quality in evaluation:
            if not self.publish(cancel, partial(self._show_quality, quality, ids)):
                return
        prompt = beginning(text, PROMPT_CHARACTERS)
        if prompt not in self._plain:
            self._plain[prompt] = self._continue(self.model, prompt, cancel)
        with model.override(**change):
            continued = self._continue(model, prompt, cancel)
        pair = self._plain[prompt], continued
        if cancel.is_set():
            self._plain.pop(prompt)  # may have been cut short
        else:
            self.publish(cancel, lambda: self._show_continuations(*pair, ids))

    @staticmethod
    def _continue(model: "Model", prompt: str, cancel: threading.Event) -> "Generation":
        from ktlab.model.generation import Generation

        longest = pace(model).write(WRITE_S, CONTINUATION, least=8)
        tokens = list(model.stream(prompt, max_new_tokens=longest, cancel=cancel))
        return Generation(
            prompt=prompt,
            text="".join(token.text for token in tokens),
            ids=tuple(token.id for token in tokens),
            prompt_tokens=0,
            prefill_s=0.0,
            decode_s=0.0,
            settings=str(model.settings),
        )

    def _bar_clicked(self, _trace: Any, points: Any, _state: Any) -> None:
        if points.xs:
            self.expert_number.value = int(points.xs[0])
            self.order_choice.value = "one"

    # Showing ---------------------------------------------------------------------------------

    def _show_loads(
        self, before: "Histogram", after: "Histogram | None", masked: tuple[int, ...]
    ) -> None:
        self.before, self.after, self.masked = before, after, masked
        self.quality, self.continuations = None, None
        with self.bars.batch_update():
            self.bars.data[0].y = before.relative_E
            self.bars.data[1].y = [0.0] * len(before) if after is None else after.relative_E
            gone = set(masked)
            self.bars.data[2].y = [y if e in gone else 0.0 for e, y in enumerate(before.relative_E)]
            self.bars.layout.title.text = f"layer {self.layer}: load before and after"
        self.summary.value = numbers(self.figures(), preliminary=True)

    def _show_quality(self, quality: Quality, ids: list[int]) -> None:
        self.quality = quality
        self.note = f"{quality.tokens:,} of {quality.total_tokens:,} tokens; {quality.method}"
        self.summary.value = numbers(self.figures(), preliminary=not quality.done)
        self.text_html.value = self._text(ids)

    def _show_continuations(
        self, before: "Generation", after: "Generation", ids: list[int]
    ) -> None:
        self.continuations = before, after
        self.text_html.value = self._text(ids)

    def figures(self) -> dict[str, Any]:
        """What the mask costs, as numbers with intervals."""
        found: dict[str, Any] = {}
        if self.before is not None:
            share = float(self.before.load_E[list(self.masked)].sum())
            found["taken away"] = f"{len(self.masked)} of {len(self.before)} experts"
            found["slots they had"] = f"{share:.1%}"
        if self.quality is not None:
            q = self.quality
            found["KL divergence"] = q.kl_mean
            found["perplexity"] = f"× {q.perplexity_ratio}"
            found["same top-1"] = q.top1_agreement
        return found

    def _text(self, ids: list[int]) -> str:
        assert self.quality is not None
        per_token = self.quality.per_token
        parts = []
        if per_token is not None and len(per_token):
            pieces = self.model.tokenizer.pieces([ids[0], *per_token.ids_T.tolist()])
            parts.append(
                loss_view(
                    pieces, per_token.logprob_a_T, per_token.logprob_b_T,
                    what=f"taking {_count(self.masked)} of layer {self.layer} away",
                )
            )  # fmt: skip
        if self.continuations is not None:
            parts.append(continuations_html(*self.continuations))
        return "".join(parts)

    def to_html(self) -> str:
        with self.worker.lock:
            return html.card(
                f"{self.title}: layer {self.layer}, {self.source.name}",
                html.Raw(style("instrument") + numbers(self.figures())),
                html.Raw(self.text_html.value),
                html.Raw(f'<div class="s">{escape(self.note)}</div>'),
            )

    def snapshot(self) -> Snapshot:
        import plotly.graph_objects as go

        self.wait()
        return Snapshot(self.to_html(), go.Figure(self.bars.to_dict()), plain=repr(self))


def _count(experts: tuple[int, ...]) -> str:
    return "1 expert" if len(experts) == 1 else f"{len(experts)} experts"
