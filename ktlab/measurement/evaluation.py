"""Perplexity of one model on a text, and its divergence from saved predictions.

The figures, their intervals and their words are those of a comparison (`quality.py`); here one
model runs, and the baseline, if there is one, comes from a file.
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ktlab import html
from ktlab.errors import ContextError, SettingError
from ktlab.interval import Interval
from ktlab.measurement.logits_file import LogitsFileError, LogitsWriter, SavedLogits, Scheme
from ktlab.measurement.provenance import Provenance
from ktlab.measurement.quality import INTERVALS
from ktlab.measurement.quality_result import Quality, summarize
from ktlab.measurement.tokens import Prediction, TokenComparison
from ktlab.measurement.windows import Text, TokenBytes, bos_of, check_window, encoded, label
from ktlab.record import Record

if TYPE_CHECKING:
    from ktlab.model.model import Model

WINDOW, HALF_WINDOW = 256, 512
"""Default windows: `compare`'s, and that of llama.cpp's perplexity tool."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Record):
    """What a model makes of a text; `against` compares with a baseline, which then is its a."""

    model: str
    label: str
    """The settings, as overrides."""
    perplexity: Interval
    bits_per_byte: Interval | None
    against: Quality | None
    tokens: int
    """Predicted so far, of `total_tokens`."""
    total_tokens: int
    seconds: float
    method: str
    provenance: Provenance

    @property
    def done(self) -> bool:
        return self.tokens >= self.total_tokens

    def __str__(self) -> str:
        of = "" if self.done else f" of {self.total_tokens:,}"
        lines = [f"{self.model}, {self.label}: {self.tokens:,}{of} tokens, {self.method}"]
        if self.against is not None:
            return "\n".join([*lines, str(self.against), str(self.provenance)])
        lines.append(f"  perplexity      {self.perplexity}")
        if self.bits_per_byte is not None:
            lines.append(f"  bits per byte   {self.bits_per_byte}")
        return "\n".join([*lines, str(self.provenance)])

    __repr__ = __str__

    def to_html(self) -> str:
        """A card with the figures."""
        if self.against is not None:
            return self.against.to_html()
        rows = {"perplexity": str(self.perplexity), "bits per byte": str(self.bits_per_byte or "")}
        return html.card(f"{self.model}, {self.label}", html.pairs(rows), self.provenance.to_html())

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        return html.mimebundle(str(self), self.to_html())


def stream_evaluation(
    model: "Model",
    text: Text | None,
    *,
    settings: Mapping[str, Any] | None = None,
    window: int | None = None,
    half: bool = False,
    max_tokens: int | None = None,
    baseline: str | Path | SavedLogits | None = None,
    save: str | Path | None = None,
) -> Iterator[Evaluation]:
    """Yield a complete `Evaluation` after every window of text, the interval narrowing.

    `half` scores the second half of each window of `window` tokens (512), as llama.cpp's
    perplexity tool does, whose numbers and files are then comparable; otherwise every token is
    predicted once in windows of 256, as in `compare`. `baseline` is a file of predictions, which
    brings its own windows and, where `text` is None, its tokens. `save` writes such a file, whole
    when the iterator has come to its end, else not at all. `settings` are what `model.override`
    takes; `model` is not touched. Raises ContextError, SettingError, LogitsFileError.
    """
    saved = SavedLogits(baseline) if isinstance(baseline, str | Path) else baseline
    ids_T, scheme = _text(model, text, window, half, max_tokens, saved)
    total, start, done = scheme.scored(len(ids_T)), perf_counter(), 0
    clone, bytes_of, bos = model.clone(), TokenBytes(model), bos_of(model)
    parts: list[TokenComparison] = []
    provenance = Provenance.collect(model=model.name)
    writer = None
    if save is not None:
        writer = LogitsWriter(save, ids_T, scheme, model.config.vocab_size)
    with clone.override(**(settings or {})), writer or nullcontext():
        for inputs_T, targets_T, first in scheme.windows(ids_T, bos):
            logits_TV = clone.forward(inputs_T)[first:]
            targets_T = targets_T[first:]
            after = Prediction.of(logits_TV, targets_T)
            before = saved.prediction(done, after, targets_T) if saved is not None else after
            if writer is not None:
                writer.add(logits_TV)
            ids = targets_T.numpy()
            parts.append(TokenComparison.of(before, after, ids, bytes_of(ids)))
            parts = [TokenComparison.join(parts)]
            done += len(ids)
            quality = summarize(
                parts,
                identical=saved is None,
                total_tokens=total,
                windows=-(-done // max(1, scheme.window - first)),
                label_a=saved.path.name if saved is not None else "",
                label_b=label(settings or {}),
                seconds=perf_counter() - start,
                method=f"{scheme}, each from an empty cache; {INTERVALS}",
            )
            yield Evaluation(
                model=model.name,
                label=label(settings or {}),
                perplexity=quality.perplexity_b,
                bits_per_byte=quality.bits_per_byte_b,
                against=quality if saved is not None else None,
                tokens=done,
                total_tokens=total,
                seconds=perf_counter() - start,
                method=str(scheme),
                provenance=provenance,
            )


def _text(
    model: "Model",
    text: Text | None,
    window: int | None,
    half: bool,
    max_tokens: int | None,
    saved: SavedLogits | None,
) -> tuple[Tensor, Scheme]:
    """What to read and how; all that does not fit together in one error."""
    if saved is None:
        if text is None:
            raise ContextError("no text and no baseline: expected something to read")
        usual = HALF_WINDOW if half else WINDOW
        scheme = Scheme(window=usual if window is None else window, half=half)
        check_window(model, scheme.window)
        ids_T = encoded(model, text, limit=None if max_tokens is None else max_tokens + 1)
        if not scheme.scored(len(ids_T)):
            raise ContextError(
                f"the text has {len(ids_T)} tokens: too few for one window of {scheme.window} of "
                "which the second half is scored"
            )
        return ids_T, scheme
    problems = []
    if window is not None and window != saved.scheme.window:
        problems.append(f"window = {window}, the baseline has {saved.scheme.window}")
    if half and not saved.scheme.half:
        problems.append("half = True, the baseline scores every token")
    if max_tokens is not None:
        problems.append("max_tokens: a baseline is compared as long as it is")
    if problems:
        raise SettingError(f"{saved.path.name}: {'; '.join(problems)}; leave it out")
    check_window(model, saved.scheme.window)
    read_T: Tensor | None = None
    if text is not None:
        try:
            read_T = encoded(model, text, limit=len(saved.ids_T))
        except ContextError as error:
            raise LogitsFileError(
                f"{saved.path.name}: it does not fit the text: {error}"
            ) from error
    saved.check(model.name, model.config.vocab_size, read_T)
    return saved.ids_T, saved.scheme
