"""Both settings over the same windows of text: the part of a quality measurement that runs a model.

T tokens of one window, V vocabulary.
"""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktlab.errors import ContextError, SettingError
from ktlab.measurement.tokens import (
    SMALL_VOCABULARY,
    Baseline,
    BaselineCache,
    Prediction,
    TokenComparison,
    window_key,
)
from ktlab.memory import trim

if TYPE_CHECKING:
    from ktlab.checkpoint.tokenizer import Tokenizer
    from ktlab.model.model import Model

PIECE_BYTES = 32 << 20
"""Of logits at a time. A window of 256 tokens is one piece up to a vocabulary of 32 thousand; with
100 thousand its logits have 105 MB, and two settings are compared."""

Text = str | Sequence[int] | NDArray[np.integer] | Tensor


@dataclass(frozen=True, kw_only=True)
class Step:
    """One window done: which text it came from and its tokens under a and b."""

    text: str
    tokens: TokenComparison
    identical: bool
    total_tokens: int


def label(settings: Mapping[str, Any]) -> str:
    """Overrides in one line, as Python would take them: {"top_k": 6} -> "top_k=6"."""
    shown = {k: v if isinstance(v, str) else repr(v) for k, v in settings.items()}
    shown = {k: v.partition("\n")[0] for k, v in shown.items()}  # of a rule set, its first line
    return ", ".join(f"{name}={value}" for name, value in shown.items()) or "as loaded"


def settings_of(model: "Model", overrides: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of `model` under `overrides`, as plain values that JSON gives back equal."""
    with model.clone().override(**overrides) as clone:
        return json.loads(settings_key(clone))


def settings_key(model: "Model") -> str:
    """The settings of a model as text that is equal where they are."""
    return json.dumps(model.settings.to_dict(), sort_keys=True, default=repr)


def evaluate(
    model: "Model",
    text: Text | Mapping[str, Text],
    *,
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    window: int = 256,
    max_tokens: int | None = None,
    cancel: threading.Event | None = None,
    baseline: BaselineCache | None = None,
    first: int = 64,
) -> Iterator[Step]:
    """Yield window after window, the texts in turn. See `quality.stream_quality`."""
    texts = _encoded(model, text, max_tokens)
    check_window(model, window)
    total = sum(len(ids) - 1 for ids in texts.values())
    clone_a, clone_b = model.clone(), model.clone()
    bytes_of = TokenBytes(model)
    bos = bos_of(model)
    with clone_a.override(**a), clone_b.override(**b):
        key = settings_key(clone_a)
        identical = key == settings_key(clone_b)
        groups = {
            name: Baseline(
                owner=model.checkpoint, settings=key, text=window_key(ids_T[:first].contiguous())
            )
            for name, ids_T in texts.items()
        }
        for name, inputs_T, targets_T in _in_turn(texts, window, first, bos):
            if cancel is not None and cancel.is_set():
                return
            of_a = _baseline(clone_a, inputs_T, targets_T, baseline, groups[name], total)
            of_b = _predicted(clone_b, inputs_T, targets_T)
            parts: list[TokenComparison] = []
            count = piece_count(len(targets_T), model.config.vocab_size)
            for some_T in targets_T.tensor_split(count):
                before = next(of_a)
                if cancel is not None and cancel.is_set():
                    return
                after = before if identical else next(of_b)
                ids = some_T.numpy()
                parts.append(TokenComparison.of(before, after, ids, bytes_of(ids)))
                del before, after  # the next piece makes its own
                if model.config.vocab_size > SMALL_VOCABULARY:
                    trim()  # else the C library keeps 0.2 GB of what a pass has freed
            del of_a, of_b
            yield Step(
                text=name,
                tokens=TokenComparison.join(parts),
                identical=identical,
                total_tokens=total,
            )


def bos_of(model: "Model") -> int | None:
    """What stands before every window; None for a model that was trained without."""
    tokenizer = model.checkpoint.tokenizer
    return tokenizer.bos_id if tokenizer is not None and tokenizer.add_bos else None


def check_window(model: "Model", window: int) -> None:
    """ContextError if the model cannot see so many tokens at once."""
    longest = model.config.context_length
    if not 1 <= window <= longest:
        raise ContextError(
            f"window = {window} tokens: expected 1 to {longest}, the context of {model.name}"
        )


class TokenBytes:
    """Bytes of UTF-8 of each token, looked up once per id; 0 for a model without tokenizer."""

    def __init__(self, model: "Model") -> None:
        self._tokenizer = model.checkpoint.tokenizer
        self._known: dict[int, int] = {}

    def __call__(self, ids_T: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._tokenizer is None:
            return np.zeros(len(ids_T), dtype=np.int64)
        for i in set(ids_T.tolist()) - self._known.keys():
            self._known[i] = len(self._tokenizer.decode_bytes([i]))
        return np.array([self._known[i] for i in ids_T.tolist()], dtype=np.int64)


def encoded(model: "Model", text: Text, name: str = "text", *, limit: int | None = None) -> Tensor:
    """Token ids (T,) of a text, the first `limit`; ContextError if nothing can be predicted."""
    if isinstance(text, str):
        if not text.strip():
            raise ContextError(f"{name} is empty: expected at least 2 tokens, one to predict")
        text = _encode(model.tokenizer, text, limit)
    ids_T = torch.as_tensor(text, dtype=torch.int64)
    if ids_T.ndim != 1 or len(ids_T) < 2:
        raise ContextError(
            f"{name} has {ids_T.numel()} tokens in shape {tuple(ids_T.shape)}: expected at least 2 "
            "in one row, so that one can be predicted"
        )
    outside = ids_T[(ids_T < 0) | (ids_T >= model.config.vocab_size)]
    if len(outside):
        raise ContextError(
            f"{name}: token id {int(outside[0])} is outside the vocabulary of {model.name}, "
            f"0 to {model.config.vocab_size - 1}"
        )
    return ids_T[:limit]


def _encode(tokenizer: "Tokenizer", text: str, limit: int | None) -> list[int]:
    """Ids of `text`, or of a beginning of it that surely holds its first `limit` ids."""
    for characters in (8, 64):
        if limit is not None and len(text) > characters * (limit + 64):
            ids = tokenizer.encode(text[: characters * (limit + 64)])
            if len(ids) > limit + 64:  # the cut changes tokens next to it only
                return ids
    return tokenizer.encode(text)


def _encoded(
    model: "Model", text: Text | Mapping[str, Text], max_tokens: int | None
) -> dict[str, Tensor]:
    texts = text if isinstance(text, Mapping) else {"text": text}
    if not texts:
        raise ContextError("no text: expected a string, token ids, or a mapping of them by name")
    if max_tokens is not None and max_tokens < len(texts):
        raise SettingError(
            f"max_tokens = {max_tokens}: expected at least one for each of {len(texts)} texts"
        )
    limit = None if max_tokens is None else max_tokens // len(texts) + 1
    return {str(k): encoded(model, part, str(k), limit=limit) for k, part in texts.items()}


def _in_turn(
    texts: Mapping[str, Tensor], window: int, first: int, bos: int | None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, inputs, targets) of every window: the first of each text, the second of each, ..."""
    first = min(first, window)
    sizes = [first] + [window] * (len(texts) - 1)  # only the very first answer needs to be quick
    runs = [cut(ids, size, window, bos) for ids, size in zip(texts.values(), sizes, strict=True)]
    for row in zip_longest(*runs):
        for name, found in zip(texts, row, strict=True):
            if found is not None:
                yield name, *found


def cut(ids_T: Tensor, first: int, window: int, bos: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, targets) of windows of `first` tokens, then `window` each; all but the first token
    of the text is predicted once.

    The first token of a later window is seen as `bos`, where the model has one.
    """
    start, size = 0, first
    while start < len(ids_T) - 1:
        stop = min(start + size, len(ids_T) - 1)
        inputs_T = ids_T[start:stop]
        if bos is not None and start:
            # As llama.cpp's perplexity tool does: a text never starts without it in training.
            inputs_T = torch.cat((torch.tensor([bos]), inputs_T[1:]))
        yield inputs_T, ids_T[start + 1 : stop + 1]
        start, size = stop, window


def _baseline(
    model: "Model",
    inputs_T: Tensor,
    targets_T: Tensor,
    cache: BaselineCache | None,
    of: Baseline,
    total_tokens: int,
) -> Iterator[Prediction]:
    """The baseline's predictions of a window, from the cache where it has them."""
    computed: Iterator[tuple[int, Prediction]] | None = None
    key, vocab_size = (window_key(inputs_T), window_key(targets_T)), model.config.vocab_size
    for index in range(piece_count(len(targets_T), vocab_size)):
        prediction = cache.get(of, (*key, index)) if cache is not None else None
        if prediction is None:
            computed = computed or enumerate(_predicted(model, inputs_T, targets_T))
            prediction = next(found for at, found in computed if at == index)
            if cache is not None:
                dtype = cache.dtype_for(total_tokens, vocab_size)
                cache.put(of, (*key, index), prediction, dtype)
        yield prediction
        del prediction


def _predicted(model: "Model", inputs_T: Tensor, targets_T: Tensor) -> Iterator[Prediction]:
    """What `model` predicts, in `piece_count` pieces; the pass is made for the first."""
    count = piece_count(len(targets_T), model.config.vocab_size)
    if count == 1:
        yield Prediction.of(model.forward(inputs_T), targets_T, own=True)
        return
    logits = model.logits_in_pieces(inputs_T, count)
    yield from map(partial(Prediction.of, own=True), logits, targets_T.tensor_split(count))


def piece_count(tokens: int, vocab_size: int) -> int:
    """Pieces in which the predictions of a window are made, kept and compared."""
    return -(-4 * tokens * vocab_size // PIECE_BYTES)
