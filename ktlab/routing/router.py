"""The router: which experts a token goes to, and with which weights.

T tokens, D hidden, E experts, G groups, K selected.
Source: DeepSeek-V2 (arXiv 2405.04434) 2.2 and DeepSeek-V3 (2412.19437) 2.1.2 with equations
12-16; masking of unselected groups with -inf as in DeepSeek's own inference code.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ktlab import html
from ktlab.checkpoint.config import ModelConfig
from ktlab.errors import SettingError
from ktlab.kernels.linear import Linear
from ktlab.routing.rules import FixedK, SelectionRule


@dataclass(frozen=True, kw_only=True)
class Routing:
    """One call's decision. `ids_TK` is -1 and `weights_TK` 0 where a rule took fewer experts."""

    logits_TE: Tensor
    scores_TE: Tensor
    ids_TK: Tensor
    weights_TK: Tensor


class Router:
    """Gate, bias, groups and the live selection rule of one layer.

    `rule`, `mask` (experts never taken) and `force` (experts always taken, first) may be set at
    any time; `check` refuses what cannot work.
    """

    own: str = ""
    """What a class of the user's that stands here is called, with its words and its code's sum."""
    _masked: tuple[frozenset[int], Tensor] | None = None

    def __init__(
        self, config: ModelConfig, layer: int, gate: Linear, bias_E: Tensor | None
    ) -> None:
        self.config = config
        self.layer = layer
        self.gate = gate
        self.bias_E = bias_E
        self.rule: SelectionRule = FixedK(config.top_k)
        self.mask: frozenset[int] = frozenset()
        self.force: tuple[int, ...] = ()

    @property
    def weight_ED(self) -> Tensor:
        """The gate's weight, float32; read from the file at first use, shared by clones."""
        return self.gate.weight_OI

    def forward(self, hidden_TD: Tensor) -> Routing:
        """Route (T, D) float32 hidden states."""
        logits_TE = F.linear(hidden_TD, self.weight_ED)
        if self.config.gating == "sigmoid":
            scores_TE = logits_TE.sigmoid()
        else:
            scores_TE = logits_TE.softmax(-1)
        ids_TK = self._ranked(scores_TE)
        weights_TK = scores_TE.gather(-1, ids_TK)
        if not isinstance(self.rule, FixedK):  # which keeps all
            kept_TK = self.rule.keep(weights_TK)
            weights_TK = weights_TK * kept_TK
            ids_TK = ids_TK.masked_fill(~kept_TK, -1)
        if self.config.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        scale = self.config.routed_scaling_factor
        return Routing(
            logits_TE=logits_TE,
            scores_TE=scores_TE,
            ids_TK=ids_TK,
            weights_TK=weights_TK if scale == 1.0 else weights_TK * scale,
        )

    def _ranked(self, scores_TE: Tensor) -> Tensor:
        """(T, k_max) ids in order of choice: forced first, then by score plus bias."""
        choice_TE = self.choice(scores_TE)
        if self.config.n_group > 1:
            choice_TE = self._in_open_groups(choice_TE)
        elif self.force or self.mask:
            choice_TE = choice_TE.clone()
        for place, expert in enumerate(self.force):
            choice_TE[:, expert] = 1e6 + len(self.force) - place
        if self.mask:
            choice_TE.masked_fill_(self._mask_E(choice_TE.device), -torch.inf)
        return choice_TE.topk(self.rule.k_max, dim=-1).indices

    def _mask_E(self, device: torch.device) -> Tensor:
        """`mask` as (E,) on a device: kept, as making it there waits for what the device does."""
        kept = self._masked
        if kept is None or kept[0] != self.mask or kept[1].device != device:
            mask_E = torch.zeros(self.config.num_experts, dtype=torch.bool)
            mask_E[sorted(self.mask)] = True
            self._masked = kept = (self.mask, mask_E.to(device))
        return kept[1]

    def choice(self, scores_TE: Tensor) -> Tensor:
        """(T, E) what experts are ranked by, before groups, `mask` and `force`; weights are made of
        the scores alone. The place for a router of your own to prefer some of them."""
        return scores_TE if self.bias_E is None else scores_TE + self.bias_E

    def _in_open_groups(self, choice_TE: Tensor) -> Tensor:
        """(T, E) with -inf for experts whose group is not among the token's `topk_group` best.

        A group's score is its two best experts' sum where the bias corrects (V3, noaux_tc), and
        its best expert where there is none (V2, group_limited_greedy).
        """
        config = self.config
        choice_TGE = choice_TE.unflatten(-1, (config.n_group, -1))
        if self.bias_E is None:
            score_TG = choice_TGE.amax(-1)
        else:
            score_TG = choice_TGE.topk(min(2, choice_TGE.shape[-1]), dim=-1).values.sum(-1)
        best_TG = score_TG.topk(config.topk_group, dim=-1).indices
        shut_TG = torch.ones_like(score_TG, dtype=torch.bool).scatter_(-1, best_TG, False)
        return choice_TGE.masked_fill(shut_TG[..., None], -torch.inf).flatten(-2)

    def check(self) -> None:
        """Raise `SettingError` if rule, mask and force cannot work together on this layer."""
        config, where = self.config, f"layers.{self.layer}.router"
        for name, experts in (("mask", self.mask), ("force", self.force)):
            outside = sorted(e for e in experts if not 0 <= e < config.num_experts)
            if outside:
                raise SettingError(
                    f"{where}: {name} names experts {outside}; this layer has 0 to "
                    f"{config.num_experts - 1}"
                )
        both = sorted(self.mask & set(self.force))
        if both:
            raise SettingError(f"{where}: experts {both} are both masked and forced; choose one")
        if len(set(self.force)) != len(self.force):
            raise SettingError(f"{where}: force={self.force} names an expert twice")
        k = self.rule.k_max
        if k < 1 or k > config.selectable_experts:
            groups = (
                f" ({config.topk_group} of {config.n_group} groups are open to a token)"
                if config.n_group > 1
                else ""
            )
            raise SettingError(
                f"{where}: top_k = {k}; expected 1 to {config.selectable_experts} of "
                f"{config.num_experts} experts{groups}; the model was trained with {config.top_k}"
            )
        if len(self.force) > k:
            raise SettingError(
                f"{where}: {len(self.force)} forced experts but top_k = {k}; raise top_k or force "
                "fewer"
            )
        # Masked experts may all lie in the open groups, so count the worst case.
        if config.selectable_experts - len(self.mask) < k:
            raise SettingError(
                f"{where}: {len(self.mask)} masked experts leave fewer than top_k = {k} of the "
                f"{config.selectable_experts} that a token can reach; mask fewer or lower top_k"
            )

    def __repr__(self) -> str:
        config = self.config
        parts = [f"{config.num_experts} experts", config.gating, f"rule {self.rule}"]
        if self.bias_E is not None:
            parts.append("bias-corrected")
        if config.n_group > 1:
            parts.append(f"{config.topk_group} of {config.n_group} groups")
        parts.append("normalised" if config.norm_topk_prob else "not normalised")
        parts.append(f"scale {config.routed_scaling_factor:g}")
        if self.mask:
            parts.append(f"masked {sorted(self.mask)}")
        if self.force:
            parts.append(f"forced {list(self.force)}")
        return html.wrapped(f"{type(self).__name__}(layer {self.layer}: {', '.join(parts)})")

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        config = self.config
        body = html.pairs(
            {
                "experts": config.num_experts,
                "rule": f"{self.rule} (trained with {config.top_k})",
                "gate": f"{config.gating}, weight {self.gate.stack.shape} float32",
                "e_score_correction_bias": "none"
                if self.bias_E is None
                else f"{self.bias_E.min():+.3f} to {self.bias_E.max():+.3f}",
                "groups": f"{config.topk_group} of {config.n_group} open to a token",
                "weights": ("normalised, " if config.norm_topk_prob else "")
                + f"routed_scaling_factor {config.routed_scaling_factor:g}",
                "masked": sorted(self.mask) or "none",
                "forced": list(self.force) or "none",
            }
        )
        return html.mimebundle(repr(self), html.card(f"layers[{self.layer}].router", body))
