"""The live view of notebook 00: the model writes, and each token tells how sure it was."""

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import numpy as np

from ktlab import html
from ktlab.measurement import intervals
from ktlab.measurement.blocks import Blocks
from ktlab.measurement.roofline import measure_machine
from ktlab.notebook.css import style
from ktlab.notebook.instrument import Instrument, Snapshot, TextSource, numbers
from ktlab.notebook.token_view import Mark, quoted, tokens_html

if TYPE_CHECKING:
    from ktlab.measurement.roofline import Bound
    from ktlab.model.generation import Token
    from ktlab.model.model import Model

HUE = 24


class GenerationView(Instrument):
    """A prompt, how many experts, how much chance. `written` holds the tokens."""

    title = "Let it write"

    def __init__(
        self, model: "Model", texts: Mapping[str, str], *, max_new_tokens: int = 64
    ) -> None:
        super().__init__(model)
        self.written: list[Token] = []
        self.bound: Bound | None = None
        """Share of the machine's ceiling at a median token; None until all is written."""
        self.prompt = ""
        self.max_new_tokens = max_new_tokens
        trained, most = model.config.top_k, model.config.selectable_experts
        self.source = TextSource(texts, self.refresh, characters=240)
        self.source.area.layout.height = "72px"
        self.experts = widgets.IntSlider(
            value=trained, min=1, max=min(most, 2 * trained), description="experts",
            continuous_update=False,
        )  # fmt: skip
        self.temperature = widgets.FloatSlider(
            value=0.7, min=0, max=1.5, step=0.1, description="temperature",
            style={"description_width": "initial"},
            continuous_update=False,
        )  # fmt: skip
        self.seed = widgets.BoundedIntText(value=0, min=0, max=10**6, description="seed")
        self.seed.layout.width = "160px"
        self.stop_button = widgets.Button(description="stop", icon="stop", layout={"width": "auto"})
        self.stop_button.on_click(lambda _: self.worker.cancel())
        self.summary, self.output = widgets.HTML(), widgets.HTML()
        for control in (self.experts, self.temperature, self.seed):
            control.observe(lambda _: self.refresh(), "value")
        top = widgets.HBox([self.source.choice, self.experts])
        below = widgets.HBox([self.temperature, self.seed, self.stop_button])
        for row in (top, below):
            row.add_class("kt-controls")
        self.body.children = [top, below, self.source.area, self.summary, self.output]
        self.refresh()

    def refresh(self) -> None:
        """Write anew."""
        self.submit(self._write, "writing")

    def _write(self, cancel: threading.Event) -> None:
        prompt, model = self.source.text.rstrip(), self.model.clone()
        written: list[Token] = []
        with model.override(top_k=int(self.experts.value)):
            stream = model.stream(
                prompt,
                max_new_tokens=self.max_new_tokens,
                temperature=float(self.temperature.value),
                seed=int(self.seed.value),
                cancel=cancel,
            )
            for token in stream:
                written.append(token)
                if not self.publish(cancel, lambda: self._show(prompt, written)):
                    return
            if len(written) > 1:
                self._measured(model, prompt, written, cancel)

    def _measured(
        self, model: "Model", prompt: str, written: "list[Token]", cancel: threading.Event
    ) -> None:
        """When all is written: how near the machine's ceiling a token is."""
        cost = model.cost(1, len(model.tokenizer.encode(prompt)) + len(written) // 2)
        bound = measure_machine().bound(
            flop=cost.flop,
            nbytes=cost.bytes,
            working_bytes=model.nbytes,
            seconds=median(token.seconds for token in written[1:]),
        )
        self.publish(cancel, lambda: self._show(prompt, written, bound))

    def _show(self, prompt: str, written: "Sequence[Token]", bound: "Bound | None" = None) -> None:
        self.prompt, self.written, self.bound = prompt, list(written), bound
        k, trained = int(self.experts.value), self.model.config.top_k
        remark = "as trained" if k == trained else f"trained with {trained}"
        self.note = f"{len(written)} tokens with {k} expert{'s' * (k > 1)} a token ({remark})"
        self.summary.value = numbers(self.figures())
        self.output.value = written_html(prompt, self.written)

    def figures(self) -> dict[str, Any]:
        """Speed beside what this machine allows, and certainty, of what was written."""
        if not self.written:
            return {}
        found: dict[str, Any] = {
            "until the first token": f"{1e3 * self.written[0].seconds:.0f} ms (once)"
        }
        rest = [1 / token.seconds for token in self.written[1:]]
        if rest:
            found["then, median"] = intervals.median(rest, unit="tokens/s")
        if self.bound is not None:
            found["of this machine's ceiling"] = self.bound
        logprob_T = np.array([token.logprob for token in self.written])
        mean = intervals.mean(logprob_T, Blocks.cut([len(logprob_T)]), scale="exp")
        high = min(1.0, mean.high) if math.isfinite(mean.high) else mean.high
        found["mean probability (geometric)"] = replace(mean, high=high)
        return found

    def to_html(self) -> str:
        with self.worker.lock:
            return html.card(
                f"{self.title}: {self.note}",
                html.Raw(style("instrument") + numbers(self.figures())),
                html.Raw(written_html(self.prompt, self.written)),
            )

    def snapshot(self) -> Snapshot:
        self.wait()
        return Snapshot(self.to_html(), plain=self.prompt + "".join(t.text for t in self.written))


def written_html(prompt: str, written: "Sequence[Token]") -> str:
    """The prompt, then the tokens: the stronger the colour, the less likely the model held it."""
    details = [f"the prompt, {len(prompt):,} characters"]
    details += [
        f"token {number}  {quoted(token.text)}  id {token.id}\n"
        f"probability {math.exp(token.logprob):.2%}\n{1e3 * token.seconds:.1f} ms"
        for number, token in enumerate(written)
    ]
    marks = [Mark()] + [Mark(hue=HUE, opacity=min(0.7, -0.14 * token.logprob)) for token in written]
    legend = [
        (Mark(hue=HUE, opacity=min(0.7, -0.14 * math.log(p))), f"probability {p:.0%}")
        for p in (0.5, 0.1, 0.01)
    ]
    pieces = [prompt] + [token.text for token in written]
    return tokens_html(
        pieces, details, marks, legend=legend, hint="Hover a token for its probability."
    )
