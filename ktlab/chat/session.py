"""One conversation over one model: history stays in the KV cache, only what is new is prefilled.

T tokens.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ktlab.attention.cache import Cache
from ktlab.checkpoint.chat_template import ChatTemplate
from ktlab.errors import ContextError
from ktlab.model import generation
from ktlab.model.generation import Token
from ktlab.model.interrupt import Interrupted, Stopping
from ktlab.model.model import Model
from ktlab.probe import Probe
from ktlab.routing.rules import FixedK

Stopped = Literal["end", "length", "context", "cancelled"]
WHY: Mapping[Stopped, str] = {
    "end": "",
    "length": "stopped at the most new tokens",
    "context": "the context is full",
    "cancelled": "stopped by you",
}
CONTEXT = 8192
"""Tokens of history by default, where the model has as many: the cache is allocated at once."""
THINK = "<think>\n"
CHUNK = 512
"""`Model.forward` reads a prompt in pieces of so many tokens."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer and what it cost; printed, the line that the chat shows below it.

    Its speeds are of this one run, so they have no interval; `ktlab.compare` repeats."""

    text: str
    ids: tuple[int, ...]
    prompt_tokens: int
    """The whole history, this question included."""
    reused_tokens: int
    """So many of them were in the cache already."""
    prefill_s: float
    """Until the first token."""
    decode_s: float
    experts: str
    """How many routed experts a token used."""
    stopped: Stopped

    @property
    def prefill_tokens_per_s(self) -> float:
        """New tokens of the prompt, a second; 0 where no answer came."""
        new = self.prompt_tokens - self.reused_tokens
        return new / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first, a second; 0 where there was only one."""
        return (len(self.ids) - 1) / self.decode_s if self.decode_s else 0.0

    def __str__(self) -> str:
        new = self.prompt_tokens - self.reused_tokens
        cached = f" (+ {self.reused_tokens:,} cached)" if self.reused_tokens else ""
        parts = [
            f"prefill {new:,} tokens{cached} at {self.prefill_tokens_per_s:,.1f} tokens/s",
            f"decode {len(self.ids):,} tokens at {self.decode_tokens_per_s:,.1f} tokens/s",
            "one run",
            self.experts,
            WHY[self.stopped],
        ]
        return " · ".join(part for part in parts if part)


class ChatSession:
    """Ask, and read the answer token by token; `last` is the answer, `messages` the history.

    A model without chat template continues the text: then the history is one text, and
    `template` is None. Settings are changed live: `chat.model.set(top_k=6)`; what is cached stays
    as it was computed. The model given is not touched (`model` is a clone of it).

    `context`: tokens of history and answer together, at most the model's. temperature 0 is greedy.
    `force_think`: begin every answer with "<think>", as KTransformers' --force_think does.
    `extra`: variables for the template, such as {"enable_thinking": False}.
    """

    def __init__(
        self,
        model: Model,
        *,
        template: ChatTemplate | None = None,
        system: str = "",
        context: int | None = None,
        max_new_tokens: int = 512,
        temperature: float = 0.6,
        top_p: float = 0.95,
        seed: int = 0,
        force_think: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        generation.check_sampling(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p
        )
        longest = model.config.context_length
        self.model = model.clone()
        self.tokenizer = model.tokenizer
        self.template = template or ChatTemplate.of(model.tokenizer, model.name)
        self.context = min(CONTEXT, longest) if context is None else context
        self.max_new_tokens, self.temperature, self.top_p = max_new_tokens, temperature, top_p
        self.seed, self.force_think, self.extra = seed, force_think, dict(extra or {})
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.last: Answer | None = None
        self._cache: Cache = self.model.new_cache(context=self.context)
        self._ids: list[int] = []
        """What the cache holds, and one token more: the last of the last answer."""
        self._text = ""
        """The text of `_ids`, as it was rendered and answered."""

    @property
    def used_tokens(self) -> int:
        """Positions of the cache that are filled."""
        return int(self._cache.lengths_B[0])

    def clear(self) -> None:
        """Forget the history; the system message stays."""
        self.messages.clear()
        self._cache.truncate(0)
        self._ids, self._text = [], ""

    def ask(
        self,
        text: str,
        *,
        cancel: threading.Event | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Iterator[Token]:
        """Yield the answer's tokens; afterwards `last` tells what it cost.

        A token's text waits until its characters are complete; bytes that never become one are
        U+FFFD in `last.text` and nowhere before.
        `cancel` stops the answer, also during prefill; what was written stays in the history, a
        question without any answer does not. `on_prefill(done, total)` is called as a long prompt
        is read. Raises ContextError where the history leaves no room (nothing is lost: the
        question is not part of it), TemplateError where the template refuses the messages.
        """
        cancel = cancel or threading.Event()
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self._prompt(asked)
        ids = self._encode(prompt)
        room = self.context - len(ids)
        if not ids:
            raise ContextError("the text is empty; expected at least one character")
        if room < 1:
            raise ContextError(
                f"the context is full: history and question have {len(ids):,} tokens, there is "
                f"room for {self.context:,}; forget the history with /clear, or start with a "
                f"longer context (the model has {self.model.config.context_length:,})"
            )
        reused = self._reuse(ids)
        written: list[Token] = []
        counter = _Counter(self.model)
        limit = min(self.max_new_tokens, room)
        self.seed += 1  # two equal questions may have two answers
        stream = generation.stream(
            self.model,
            torch.tensor(ids[reused:]),
            max_new_tokens=limit,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed - 1,
            cancel=cancel,
            stop_at_eos=True,
            cache=self._cache,
        )
        self.model.watch = partial(
            _Prefill, cancel=cancel, total=len(ids) - reused, tell=on_prefill, counter=counter
        )
        stopped: Stopped = "cancelled"  # until it ends by itself
        try:
            for token in stream:
                self.model.watch = counter.watch
                written.append(token)
                yield token
            if len(written) == limit:
                stopped = "length" if limit == self.max_new_tokens else "context"
            elif not cancel.is_set():
                stopped = "end"
        except Interrupted:
            pass
        finally:
            # Also where the reader stops reading, or Ctrl-C ends a forward pass.
            self.model.watch = None
            answer = self.tokenizer.decode([token.id for token in written])
            self._keep(asked, prompt, answer, ids + [token.id for token in written], bool(written))
            self.last = Answer(
                text=answer,
                ids=tuple(token.id for token in written),
                prompt_tokens=len(ids),
                reused_tokens=reused,
                prefill_s=written[0].seconds if written else 0.0,
                decode_s=sum(token.seconds for token in written[1:]),
                experts=str(counter),
                stopped=stopped,
            )

    def _prompt(self, messages: list[dict[str, str]]) -> str:
        system = [{"role": "system", "content": self.system}] if self.system else []
        if self.template is None:
            text = "\n".join(message["content"] for message in system + messages)
        else:
            text = self.template.render(system + messages, **self.extra)
        return text + THINK if self.force_think and not text.endswith(THINK) else text

    def _encode(self, prompt: str) -> list[int]:
        """Ids of the whole history. What the model itself wrote keeps the tokens that it chose."""
        special = self.template is not None
        if self._text and prompt.startswith(self._text):
            rest = prompt[len(self._text) :]
            return self._ids + self.tokenizer.encode(rest, bos=False, special=special)
        return self.tokenizer.encode(prompt, bos=not special, special=special)

    def _reuse(self, ids: list[int]) -> int:
        """Bring the cache to the longest beginning of `ids` that it holds; at least one id less."""
        forms = [block.attention.form for block in self.model.layers]
        if [layer.form for layer in self._cache.layers] != forms:  # switched since
            self._cache = self.model.new_cache(context=self.context)
        held = min(self.used_tokens, len(ids) - 1)
        same = next((i for i in range(held) if ids[i] != self._ids[i]), held)
        self._cache.truncate(same)
        return same

    def _keep(
        self, asked: list[dict[str, str]], prompt: str, answer: str, ids: list[int], answered: bool
    ) -> None:
        self._ids, self._text = ids, prompt + answer
        if answered and self.template is None:
            # The history is one text: an answer follows its question without a line end.
            before = f"{self.system}\n" if self.system else ""
            self.messages = [{"role": "text", "content": self._text.removeprefix(before)}]
        elif answered:
            thought = THINK if self.force_think and prompt.endswith(THINK) else ""
            self.messages = [*asked, {"role": "assistant", "content": thought + answer}]

    def __repr__(self) -> str:
        kind = "chat" if self.template is not None else "plain text, no chat template"
        return (
            f"ChatSession({self.model.name}: {kind}, {len(self.messages)} messages, "
            f"{self.used_tokens:,} of {self.context:,} tokens)"
        )


class _Counter:
    """How many experts tokens use: known from a fixed rule, counted for another."""

    def __init__(self, model: Model) -> None:
        self.config = model.config
        rules = [block.router.rule for block in model.moe_blocks]
        self.fixed = [rule.k for rule in rules if isinstance(rule, FixedK)]
        self.watch = None if len(self.fixed) == len(rules) else partial(_Counting, counter=self)
        self.taken = self.choices = 0

    def count(self, ids_TK: Tensor) -> None:
        self.taken += int((ids_TK >= 0).sum())
        self.choices += len(ids_TK)

    def __str__(self) -> str:
        trained = self.config.top_k
        if self.watch is not None:
            used = f"{self.taken / max(1, self.choices):.1f} experts on average"
        elif not self.fixed:
            return "no routed experts"
        else:
            least, most = min(self.fixed), max(self.fixed)
            used = f"{least} experts" if least == most else f"{least} to {most} experts"
            if least == most == trained:
                return f"{used}, as trained"
        return f"{used}, trained with {trained}"


class _Counting(Probe):
    """Passes everything on, and counts the experts chosen."""

    def __init__(self, inner: Probe, counter: _Counter) -> None:
        self._inner, self._counter = inner, counter
        self.inside = inner.inside or counter.watch is not None

    def record(self, name: str, values: Tensor) -> None:
        if self._counts(name):
            self._counter.count(values)
        self._inner.record(name, values)

    def wants(self, name: str) -> bool:
        return self._counts(name) or self._inner.wants(name)

    def _counts(self, name: str) -> bool:
        return name.endswith(".router.ids") and self._counter.watch is not None

    def stage(self, name: str) -> AbstractContextManager[None]:
        return self._inner.stage(name)


class _Prefill(Stopping):
    """Stops between two stages, and tells how far a prompt is read: its pieces begin with their
    embedding."""

    def __init__(
        self,
        inner: Probe,
        *,
        cancel: threading.Event,
        total: int,
        tell: Callable[[int, int], None] | None,
        counter: _Counter,
    ) -> None:
        super().__init__(_Counting(inner, counter), cancel)
        self._done, self._total, self._tell = 0, total, tell

    def stage(self, name: str) -> AbstractContextManager[None]:
        if name == "embedding" and self._tell is not None and self._total > CHUNK:
            self._tell(self._done, self._total)
            self._done = min(self._done + CHUNK, self._total)
        return super().stage(name)
