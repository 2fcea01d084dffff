"""Selection rules: how many of the ranked experts a token takes.

A rule sees the experts of each token in order of choice, best first, and says how many to keep.
T tokens, K experts at most.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ktlab.errors import SettingError


class SelectionRule(Protocol):
    """What a router asks of a rule; a class with these two members in a notebook cell works too."""

    @property
    def k_max(self) -> int:
        """The most experts that a token can take."""
        ...

    def keep(self, scores_TK: Tensor) -> Tensor:
        """(T, k_max) scores in order of choice -> (T, k_max) bool: which are kept."""
        ...


@dataclass(frozen=True)
class FixedK:
    """The k best experts, as every DeepSeek model is trained."""

    k: int

    @property
    def k_max(self) -> int:
        return self.k

    def keep(self, scores_TK: Tensor) -> Tensor:
        return torch.ones_like(scores_TK, dtype=torch.bool)

    def __str__(self) -> str:
        return f"k = {self.k}"


@dataclass(frozen=True)
class RelativeThreshold:
    """Experts while p_i > t * p_1, where p_1 is the token's largest score; at least `k_min`.

    Source: "smart expert reduction", ik_llama.cpp pull request 239. p are the gate's scores
    (sigmoid or softmax) before normalisation, without the correction bias.
    """

    t: float
    k_max: int = 8
    k_min: int = 1

    def __post_init__(self) -> None:
        _check_range(self.k_min, self.k_max)
        if not 0.0 <= self.t <= 1.0:
            raise SettingError(f"t = {self.t}: expected a fraction of the best score, 0 to 1")

    def keep(self, scores_TK: Tensor) -> Tensor:
        kept = scores_TK > self.t * scores_TK.amax(-1, keepdim=True)
        kept[:, : self.k_min] = True
        return kept

    def __str__(self) -> str:
        return f"p > {self.t:g} p1, {self.k_min}..{self.k_max}"


@dataclass(frozen=True)
class CumulativeProbability:
    """The fewest experts whose share of the k_max best scores' sum reaches `p`; at least `k_min`.

    Source: top-p routing, arXiv 2403.07652, with the probabilities taken over the k_max best: a
    sigmoid gate has no distribution over all experts.
    """

    p: float
    k_max: int = 8
    k_min: int = 1

    def __post_init__(self) -> None:
        _check_range(self.k_min, self.k_max)
        if not 0.0 < self.p <= 1.0:
            raise SettingError(f"p = {self.p}: expected a share of the scores above 0, up to 1")

    def keep(self, scores_TK: Tensor) -> Tensor:
        ranked_TK, order_TK = scores_TK.sort(-1, descending=True)
        share_TK = ranked_TK / ranked_TK.sum(-1, keepdim=True).clamp_min(1e-20)
        # An expert is needed while those before it have not reached p.
        before_TK = share_TK.cumsum(-1) - share_TK
        needed = before_TK < self.p - 1e-6 if self.p < 1 else torch.ones_like(before_TK).bool()
        kept = torch.zeros_like(needed).scatter_(-1, order_TK, needed)
        kept[:, : self.k_min] = True
        return kept

    def __str__(self) -> str:
        return f"top-p {self.p:g}, {self.k_min}..{self.k_max}"


def with_k(rule: SelectionRule, k: int) -> SelectionRule:
    """The same rule with at most `k` experts: what `top_k=` changes."""
    if isinstance(rule, FixedK):
        return FixedK(k)
    if isinstance(rule, (RelativeThreshold, CumulativeProbability)):
        return replace(rule, k_max=k, k_min=min(rule.k_min, k))
    raise SettingError(f"{rule!r} has no top_k to change; give the rule itself: rule=...")


def _check_range(k_min: int, k_max: int) -> None:
    if not 1 <= k_min <= k_max:
        raise SettingError(f"k_min = {k_min}, k_max = {k_max}: expected 1 <= k_min <= k_max")
