"""Text from a model, token by token: greedy or sampled, streaming, cancellable.

V vocabulary.
"""

import codecs
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ktlab import html
from ktlab.attention.cache import Cache
from ktlab.errors import SettingError

if TYPE_CHECKING:
    from ktlab.model.model import Model


@dataclass(frozen=True, kw_only=True)
class Token:
    """One generated token. `text` is what it adds: '' while a character is still incomplete."""

    id: int
    text: str
    logprob: float
    """Natural logarithm of its probability, before temperature and top-p."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A finished (or cancelled) generation and what it cost."""

    prompt: str
    text: str
    ids: tuple[int, ...]
    prompt_tokens: int
    prefill_s: float
    """Until the first token, prompt included."""
    decode_s: float
    """Median over the later tokens would hide stalls, so this is their sum."""
    settings: str

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first, a second; 0 where there was only one."""
        return (len(self.ids) - 1) / self.decode_s if len(self.ids) > 1 else 0.0

    def __str__(self) -> str:
        return self.prompt + self.text

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        body = html.Raw(
            f'<div style="white-space:pre-wrap;font-family:var(--jp-code-font-family,monospace)">'
            f'<span class="s">{html.text(self.prompt)}</span>{html.text(self.text)}</div>'
        )
        foot = html.Raw(
            f'<div class="s">{self.prompt_tokens} prompt tokens to first token in '
            f"{self.prefill_s * 1e3:.0f} ms, then {len(self.ids)} tokens at "
            f"{self.decode_tokens_per_s:.0f} tokens/s (one run); {html.text(self.settings)}</div>"
        )
        return html.mimebundle(str(self), html.card("", body, foot))


def check_sampling(*, max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raise `SettingError` on values outside their range, all together."""
    problems = []
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens = {max_new_tokens}, expected at least 1")
    if temperature < 0:
        problems.append(f"temperature = {temperature}, expected 0 (greedy) or more")
    if not 0 < top_p <= 1:
        problems.append(f"top_p = {top_p}, expected above 0, up to 1")
    if problems:
        raise SettingError("; ".join(problems))


def stream(
    model: "Model",
    ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    cancel: threading.Event | None,
    stop_at_eos: bool,
    cache: Cache | None = None,
) -> Iterator[Token]:
    """Yield tokens until `max_new_tokens`, the end-of-sequence token, or `cancel` is set.

    `cache`: what `ids` follow, to be continued; it holds every token but the last that came.
    """
    generator = torch.Generator().manual_seed(seed)
    tokenizer = model.checkpoint.tokenizer
    cache = cache or model.new_cache(context=len(ids) + max_new_tokens)
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pending = ids
    start = perf_counter()
    for _ in range(max_new_tokens):
        if cancel is not None and cancel.is_set():
            return
        logits_V = model.next_logits(pending[None], cache)[0]
        logprobs_V = logits_V.log_softmax(-1)
        chosen = sample(logits_V, temperature=temperature, top_p=top_p, generator=generator)
        if stop_at_eos and tokenizer is not None and chosen in tokenizer.stop_ids:
            return
        text = utf8.decode(tokenizer.decode_bytes([chosen])) if tokenizer is not None else ""
        now = perf_counter()
        yield Token(id=chosen, text=text, logprob=float(logprobs_V[chosen]), seconds=now - start)
        start = perf_counter()  # the reader's time between tokens is not ours
        pending = torch.tensor([chosen])


def sample(
    logits_V: Tensor, *, temperature: float, top_p: float, generator: torch.Generator
) -> int:
    """One id: the best at temperature 0, else drawn from the smallest set that holds `top_p`."""
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities, order = (logits_V / temperature).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return int(order[drawn])
