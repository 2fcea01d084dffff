"""A model's predictions on a text, saved: llama.cpp's `--kl-divergence-base` files, and our own.

llama.cpp (tools/perplexity/perplexity.cpp) writes "_logits_", then int32 n_ctx, n_vocab, n_chunk,
the n_chunk * n_ctx tokens, and a record for each token in the second half of each chunk but its
first: float32 scale and smallest log-probability, then n_vocab uint16 (filled up to an even
number): log p = scale * code + smallest. What lies more than 16 nats under the best is cut off.

Ours begin with "_ktlab1_" and int32 window, n_vocab, n_tokens; every token but the first has a
record, in windows as `compare` cuts them. A file is complete or not there: it is written beside
its place and moved.

T tokens, V vocabulary.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktlab import html
from ktlab.errors import KtlabError
from ktlab.measurement.tokens import Prediction
from ktlab.measurement.windows import cut

LLAMA_CPP, KTLAB = b"_logits_", b"_ktlab1_"
HEADER_BYTES = 8 + 3 * 4
RANGE_NATS = 16
LARGEST = 1 << 28


class LogitsFileError(KtlabError):
    """A file of predictions that is damaged, or of another text, vocabulary or window."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a text is cut into windows, and what of them is scored."""

    window: int
    """Tokens a forward pass sees."""
    half: bool
    """Score the second half of full windows only, as llama.cpp's perplexity tool does."""

    def scored(self, tokens: int) -> int:
        """Predicted tokens of a text of so many."""
        if not self.half:
            return max(0, tokens - 1)
        return tokens // self.window * (self.window - 1 - self.window // 2)

    def windows(self, ids_T: Tensor, bos: int | None) -> Iterator[tuple[Tensor, Tensor, int]]:
        """(inputs, targets, first scored) of every window; later ones begin with `bos`, under
        `half` the first too."""
        if not self.half:
            for inputs_T, targets_T in cut(ids_T, self.window, self.window, bos):
                yield inputs_T, targets_T, 0
            return
        for start in range(0, len(ids_T) - self.window + 1, self.window):
            chunk_T = ids_T[start : start + self.window].clone()
            targets_T = chunk_T[1:].clone()
            if bos is not None:
                chunk_T[0] = bos
            yield chunk_T[:-1], targets_T, self.window // 2

    def __str__(self) -> str:
        what = "the second half of each scored" if self.half else "every token scored once"
        return f"windows of {self.window} tokens, {what}"


def record_bytes(vocab_size: int) -> int:
    """Of one predicted token."""
    return 2 * (2 * ((vocab_size + 1) // 2) + 4)


class SavedLogits:
    """A file of predictions, mapped: `scheme`, `ids_T`, `vocab_size`, `prediction(place, ...)`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        found = self.path.stat().st_size  # OSError where there is none: says it all
        with self.path.open("rb") as file:
            header = file.read(HEADER_BYTES)
        magic = header[:8]
        if magic not in (LLAMA_CPP, KTLAB) or len(header) < HEADER_BYTES:
            raise self._error(
                f"it begins with {magic!r}, expected {LLAMA_CPP.decode()} (llama-perplexity "
                f"--kl-divergence-base) or {KTLAB.decode()} (ktlab eval --save-logits)"
            )
        window, vocab_size, count = (int(x) for x in np.frombuffer(header, "<i4", offset=8))
        if not (2 <= window < LARGEST and 1 <= vocab_size < LARGEST and 1 <= count < LARGEST):
            raise self._error(
                f"windows of {window} tokens, a vocabulary of {vocab_size}, {count} "
                f"{'chunks' if magic == LLAMA_CPP else 'tokens'}: the header is damaged"
            )
        self.scheme = Scheme(window=window, half=magic == LLAMA_CPP)
        self.vocab_size = vocab_size
        tokens = count * window if self.scheme.half else count
        records = self.scheme.scored(tokens)
        expected = HEADER_BYTES + 4 * tokens + records * record_bytes(vocab_size)
        if found != expected:
            raise self._error(
                f"it has {found:,} bytes, its header promises {expected:,}: "
                f"{'cut off; ' if found < expected else ''}save it again"
            )
        ids = np.fromfile(self.path, "<i4", count=tokens, offset=HEADER_BYTES)
        self.ids_T = torch.from_numpy(ids.astype(np.int64))
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            raise self._error(f"token ids from {low} to {high} in a vocabulary of {vocab_size}")
        self._records = np.memmap(
            self.path,
            "<u2",
            "r",
            HEADER_BYTES + 4 * tokens,
            (records, record_bytes(vocab_size) // 2),
        )

    @property
    def scored_tokens(self) -> int:
        return len(self._records)

    def check(self, where: str, vocab_size: int, ids_T: Tensor | None) -> None:
        """LogitsFileError unless it is about this vocabulary and (if given) this text."""
        if self.vocab_size != vocab_size:
            raise self._error(
                f"a vocabulary of {self.vocab_size:,} tokens, {where} has {vocab_size:,}: the "
                "baseline is of another model family"
            )
        if ids_T is None:
            return
        same = min(len(ids_T), len(self.ids_T))
        different = (ids_T[:same] != self.ids_T[:same]).nonzero()
        if len(different) or len(ids_T) < len(self.ids_T):
            at = int(different[0]) if len(different) else same
            raise self._error(
                f"it is about other tokens: {len(self.ids_T):,} of them, the text has "
                f"{len(ids_T):,}; they differ from token {at:,} on. Leave --text out to use the "
                "file's own tokens"
            )

    def prediction(self, start: int, other: Prediction, targets_T: Tensor) -> Prediction:
        """The predictions of the records from `start` on, as many as `targets_T`.

        Where the file has cut a probability off (16 nats under the best), that of `other` is
        taken: it adds nothing to a divergence, as llama.cpp adds nothing there.
        """
        block = self._records[start : start + len(targets_T)]
        scale_T, least_T = np.ascontiguousarray(block[:, :4]).view("<f4").T
        codes_TV = block[:, 4 : 4 + self.vocab_size].astype(np.float32)
        if not (np.isfinite(scale_T).all() and np.isfinite(least_T).all()):
            raise self._error(f"record {start:,} or one after it holds no numbers: it is damaged")
        logprobs_TV = torch.from_numpy(codes_TV * scale_T[:, None] + least_T[:, None])
        target_T = logprobs_TV.gather(1, targets_T[:, None])[:, 0]
        top1_T = logprobs_TV.argmax(dim=-1)
        kept_TV = torch.where(logprobs_TV > -RANGE_NATS, logprobs_TV, other.logprobs_TV)
        return Prediction(logprobs_TV=kept_TV, target_T=target_T, top1_T=top1_T)

    def _error(self, what: str) -> LogitsFileError:
        return LogitsFileError(f"{self.path.name}: {what}")

    def __repr__(self) -> str:
        return (
            f"SavedLogits({self.path.name}: {self.scored_tokens:,} predictions over "
            f"{self.vocab_size:,} tokens, {self.scheme})"
        )


class LogitsWriter:
    """Writes the same; a context manager that leaves a whole file or none."""

    def __init__(self, path: str | Path, ids_T: Tensor, scheme: Scheme, vocab_size: int) -> None:
        self.path = Path(path)
        self._part = self.path.with_name(self.path.name + ".part")
        count = len(ids_T) // scheme.window if scheme.half else len(ids_T)
        ids_T = ids_T[: count * scheme.window] if scheme.half else ids_T
        needed = scheme.scored(len(ids_T)) * record_bytes(vocab_size) + 4 * len(ids_T)
        free = shutil.disk_usage(self.path.absolute().parent).free
        if needed > free:
            raise LogitsFileError(
                f"{self.path}: the logits of {scheme.scored(len(ids_T)):,} tokens need "
                f"{html.byte_size(needed)}, the disk has {html.byte_size(free)}; take fewer with "
                "--max-tokens"
            )
        self._missing = scheme.scored(len(ids_T))
        self._file = self._part.open("wb")
        self._file.write(LLAMA_CPP if scheme.half else KTLAB)
        self._file.write(np.array([scheme.window, vocab_size, count], "<i4").tobytes())
        self._file.write(ids_T.numpy().astype("<i4").tobytes())

    def add(self, logits_TV: Tensor) -> None:
        """The next predictions."""
        self._file.write(encode(logits_TV.numpy()).tobytes())
        self._missing -= len(logits_TV)

    def __enter__(self) -> "LogitsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None and not self._missing:
            os.replace(self._part, self.path)
        else:
            self._part.unlink()


def encode(logits_TV: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Records of logits, as llama.cpp's log_softmax(..., uint16_t * log_prob, ...) makes them."""
    tokens, vocab_size = logits_TV.shape
    best_T1 = logits_TV.max(-1, keepdims=True)
    least_T1 = np.maximum(logits_TV.min(-1, keepdims=True), best_T1 - RANGE_NATS)
    sums_T1 = np.log(np.exp(logits_TV - best_T1, dtype=np.float64).sum(-1, keepdims=True))
    scale_T1 = ((best_T1 - least_T1) / np.float32(65535)).astype(np.float32)
    divided = np.where(scale_T1 > 0, scale_T1, 1)
    records = np.zeros((tokens, record_bytes(vocab_size) // 2), np.uint16)
    head = np.hstack([scale_T1, (least_T1 - best_T1 - sums_T1)]).astype("<f4")
    records[:, :4] = np.ascontiguousarray(head).view("<u2")
    codes = np.rint(np.maximum(logits_TV - least_T1, 0) / divided)
    records[:, 4 : 4 + vocab_size] = np.minimum(codes, 65535)
    return records
