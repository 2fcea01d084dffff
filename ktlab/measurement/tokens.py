"""Two settings, token by token: divergence, agreement and surprise at each predicted token.

Letters: T predicted tokens, V vocabulary.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MIB = 1 << 20
CHUNK_BYTES = 4 * MIB
"""Of log-probabilities compared at a time: some arrays of that size are made on the way, and of a
window of 256 tokens and a vocabulary of 100 thousand they would be 105 MB each."""

SMALL_VOCABULARY = 1 << 15
"""A model with more tokens is gigabytes, beside which a cache of float32 takes room for nothing."""


def pieces(tokens: int, vocab_size: int) -> Iterator[slice]:
    """Rows that are computed at a time."""
    count = max(1, CHUNK_BYTES // (4 * vocab_size))
    return (slice(start, start + count) for start in range(0, tokens, count))


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """What one setting says about the next token at T places, kept for comparison."""

    logprobs_TV: Tensor
    """float32, or float16 where a cache had to save room."""
    target_T: Tensor
    """log-probability of the token that the text has, float32 always, nats."""
    top1_T: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (self.logprobs_TV, self.target_T)) + (
            self.top1_T.numel() * self.top1_T.element_size()
        )

    @classmethod
    def of(cls, logits_TV: Tensor, targets_T: Tensor, *, own: bool = False) -> "Prediction":
        """Log-softmax in float32 of logits, with the targets' share picked out. `own`: they may be
        overwritten, since nobody else wants them."""
        values_TV = logits_TV.float()
        logprobs_TV = values_TV if own else torch.empty_like(values_TV)
        with torch.inference_mode():
            for rows in pieces(*values_TV.shape):
                logprobs_TV[rows] = torch.log_softmax(values_TV[rows], dim=-1)
        target_T = logprobs_TV.gather(1, targets_T[:, None])[:, 0]
        return cls(logprobs_TV=logprobs_TV, target_T=target_T, top1_T=logprobs_TV.argmax(dim=-1))


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenComparison:
    """Settings a and b at each of T predicted tokens. Nats; probabilities in 0..1."""

    ids_T: NDArray[np.int64]
    """The token that the text has at each place."""
    kl_T: NDArray[np.float32]
    """KL(a || b) of the distributions of the next token."""
    same_top1_T: NDArray[np.bool_]
    logprob_a_T: NDArray[np.float32]
    """Log-probability of the text's own token under a."""
    logprob_b_T: NDArray[np.float32]
    bytes_T: NDArray[np.int64]
    """Bytes of UTF-8 of each token; 0 throughout without a tokenizer."""

    def __len__(self) -> int:
        return len(self.ids_T)

    @property
    def probability_change_T(self) -> NDArray[np.float32]:
        """p_b - p_a of the text's own token."""
        return np.exp(self.logprob_b_T) - np.exp(self.logprob_a_T)

    @classmethod
    def of(
        cls, a: Prediction, b: Prediction, ids_T: NDArray[np.int64], bytes_T: NDArray[np.int64]
    ) -> "TokenComparison":
        """Compare two predictions at the same places."""
        return cls(
            ids_T=ids_T,
            bytes_T=bytes_T,
            kl_T=divergence(a.logprobs_TV, b.logprobs_TV).numpy(),
            same_top1_T=(a.top1_T == b.top1_T).numpy(),
            logprob_a_T=a.target_T.numpy(),
            logprob_b_T=b.target_T.numpy(),
        )

    @classmethod
    def join(cls, parts: Sequence["TokenComparison"]) -> "TokenComparison":
        """One after the other."""
        names = [f.name for f in fields(cls)]
        return cls(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})


def divergence(logprobs_a_TV: Tensor, logprobs_b_TV: Tensor) -> Tensor:
    """KL(a || b) in nats at each place, (T,), never negative, exactly 0 for equal inputs.

    The sum is sum_v p (d + exp(-d) - 1), d = log p - log q: the terms added to p d sum to zero
    for normalised distributions, and make each term non-negative and of second order in d. So
    rounding does not drown small divergences, as it does in the plain sum of p d.
    """
    pairs = ((logprobs_a_TV[r], logprobs_b_TV[r]) for r in pieces(*logprobs_a_TV.shape))
    return torch.cat([_divergence(a_TV.float(), b_TV.float()) for a_TV, b_TV in pairs])


def _divergence(logprobs_a_TV: Tensor, logprobs_b_TV: Tensor) -> Tensor:
    d_TV = logprobs_a_TV - logprobs_b_TV
    p_TV = logprobs_a_TV.exp()
    near_TV = p_TV * (torch.expm1(-d_TV) + d_TV)
    far_TV = p_TV * (d_TV - 1) + logprobs_b_TV.exp()
    return torch.where(d_TV.abs() < 1, near_TV, far_TV).sum(dim=-1).clamp_min(0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Baseline:
    """Whose predictions, and on what: these weights (by identity; they are kept alive) under these
    settings, on the text that begins with these tokens."""

    owner: object
    settings: str
    text: bytes = b""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Baseline) or self.owner is not other.owner:
            return False
        return (self.settings, self.text) == (other.settings, other.text)

    def __hash__(self) -> int:
        return hash((id(self.owner), self.settings, self.text))


class BaselineCache:
    """The baseline's predictions on a text, so that changing b does not compute a again.

    Bounded in bytes. A text whose log-probabilities fit is kept in float32, a longer one, or one of
    a vocabulary over 32,768, in float16 (which moves a mean KL divergence by under 3e-6 nats,
    measured in the tests); what does not fit then is computed again each time. Another baseline or
    text pushes out the oldest one. Safe to share between threads.
    """

    def __init__(self, max_bytes: int = 256 * MIB) -> None:
        self.max_bytes = max_bytes
        self.nbytes = self.hits = self.misses = 0
        self._groups: OrderedDict[Baseline, dict[Hashable, Prediction]] = OrderedDict()
        self._lock = threading.Lock()

    def dtype_for(self, tokens: int, vocab_size: int) -> torch.dtype:
        """float32 if a text of so many tokens fits with it and the model is small, else float16."""
        fits = tokens * vocab_size * 4 <= self.max_bytes
        return torch.float32 if fits and vocab_size <= SMALL_VOCABULARY else torch.float16

    def get(self, baseline: Baseline, key: Hashable) -> Prediction | None:
        """The prediction stored for a window of a baseline, or a piece of one; or None."""
        with self._lock:
            found = self._groups.get(baseline, {}).get(key)
            if found is None:
                self.misses += 1
            else:
                self.hits += 1
                self._groups.move_to_end(baseline)
            return found

    def put(
        self, baseline: Baseline, key: Hashable, prediction: Prediction, dtype: torch.dtype
    ) -> None:
        """Keep a prediction if it fits after older groups were dropped."""
        kept = Prediction(
            logprobs_TV=prediction.logprobs_TV.to(dtype),
            target_T=prediction.target_T,
            top1_T=prediction.top1_T,
        )
        with self._lock:
            windows = self._groups.setdefault(baseline, {})
            self._groups.move_to_end(baseline)
            if key in windows:
                return
            while self.nbytes + kept.nbytes > self.max_bytes and len(self._groups) > 1:
                _, dropped = self._groups.popitem(last=False)
                self.nbytes -= sum(p.nbytes for p in dropped.values())
            if self.nbytes + kept.nbytes <= self.max_bytes:
                windows[key] = kept
                self.nbytes += kept.nbytes

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._groups.clear()
            self.nbytes = 0

    def __repr__(self) -> str:
        return (
            f"BaselineCache({self.nbytes / MIB:.1f} of {self.max_bytes / MIB:.0f} MiB, "
            f"{self.hits} predictions reused, {self.misses} computed)"
        )


def window_key(ids_T: Tensor) -> bytes:
    """A window's identity: its tokens."""
    return hashlib.sha256(ids_T.numpy().tobytes()).digest()
