"""One layer: attention, then a feed-forward part that is dense or a mixture of experts.

B batch, T tokens, D hidden.
"""

import copy
from functools import partial
from typing import Any, NoReturn, TypeVar

from torch import Tensor

from ktlab import html
from ktlab.attention.cache import LayerCache
from ktlab.attention.stage import Attention
from ktlab.checkpoint.config import ModelConfig
from ktlab.errors import StageError
from ktlab.experts.bank import ExpertBank
from ktlab.experts.mlp import MLP
from ktlab.kernels.norm import rms_norm
from ktlab.kernels.seat import HOST, Seat
from ktlab.model.deferral import Later, split
from ktlab.model.placed_block import BlockSeats, Twins, move, placed_forward
from ktlab.model.whole_layer import WholeLayer
from ktlab.probe import NO_PROBE, Probe
from ktlab.routing.router import Router

_Block = TypeVar("_Block", bound="Block")


class Block:
    """What both kinds of layer share: norms, attention and the residual stream."""

    deferred = 0
    """Experts of each token that the next layer adds (`ktlab.model.deferral`)."""

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        attention: Attention,
        attention_norm_D: Tensor,
        mlp_norm_D: Tensor,
    ) -> None:
        self.config = config
        self.index = index
        self.attention = attention
        self.attention_norm_D = attention_norm_D
        self.mlp_norm_D = mlp_norm_D
        self._whole: WholeLayer | None = None
        self.moved = False
        """Whether a placement has put a stage elsewhere: else nobody has to look."""
        self.in_prefill = Twins()
        """Stages that are somewhere else while prompts are read."""

    def forward(
        self,
        hidden_BTD: Tensor,
        cache: LayerCache,
        positions_BT: Tensor,
        probe: Probe = NO_PROBE,
        later: Later | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D) in host memory; writes this layer's cache.

        `later` brings what the layer before deferred and takes what this one does; without it
        nothing is deferred.
        """
        if (seats := self.seats) is not None:
            given = (self, seats, hidden_BTD, HOST, cache, positions_BT, probe, later)
            return move(placed_forward(*given), seats.attention, HOST)
        left = None if later is None else later.take()
        defers = self.deferred > 0 and later is not None
        if hidden_BTD.shape[:2] == (1, 1) and not (probe.inside or defers):
            if (whole := self.whole()) is not None:
                self.attention.check_cache(cache)
                with probe.stage(f"layers.{self.index}"):
                    passed = WholeLayer.through([whole], [cache], hidden_BTD, positions_BT)
                return passed if left is None else passed + left(HOST).view_as(passed)
        eps = self.config.rms_eps
        with probe.stage(f"layers.{self.index}.attention"):
            normed = rms_norm(hidden_BTD, self.attention_norm_D, eps)
            hidden_BTD = hidden_BTD + self.attention.forward(normed, cache, positions_BT, probe)
        normed_TD = rms_norm(hidden_BTD, self.mlp_norm_D, eps).flatten(0, 1)
        more = (later,) if defers else ()  # a layer of one's own need not know of it
        mixed_TD = self.feed_forward(normed_TD, probe, *more)
        hidden_BTD = hidden_BTD + mixed_TD.view_as(hidden_BTD)
        if left is not None:
            hidden_BTD = hidden_BTD + left(HOST).view_as(hidden_BTD)
        probe.record(f"layers.{self.index}.hidden", hidden_BTD.flatten(0, 1))
        return hidden_BTD

    def feed_forward(self, hidden_TD: Tensor, probe: Probe, later: Later | None = None) -> Tensor:
        raise NotImplementedError

    def whole(self) -> WholeLayer | None:
        """What takes a decoded token through all of it at once; None where stages do."""
        if type(self) not in PLAIN:
            return None
        self._whole = found = WholeLayer.of(self, self._whole)
        return found if found.usable else None

    def let_go(self) -> None:
        """Keep no matrix alive for decoding; the next token finds them again."""
        self._whole = None
        self.attention.let_go()

    def clone(self: _Block) -> _Block:
        """The same weights under stages whose switches are their own."""
        block = copy.copy(self)
        for name, stage in vars(self).items():
            if isinstance(stage, (Attention, ExpertBank, MLP)):
                setattr(block, name, stage.clone())
            elif isinstance(stage, Router):
                setattr(block, name, copy.copy(stage))
        block.in_prefill = Twins({name: s.clone() for name, s in self.in_prefill.items()})
        return block

    @property
    def seats(self) -> BlockSeats | None:
        """Where its stages are; None: all on the host, as loaded."""
        return BlockSeats.of(self) if self.moved else None

    def stages_in(self, phase: str) -> dict[str, Any]:
        """The stage objects by name, as they are in "decode" or "prefill"."""
        return {**self.stages(), **self.in_prefill} if phase == "prefill" else self.stages()

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized weights."""
        return sum(getattr(s, "nbytes", 0) for s in self.stages().values())

    def stages(self) -> dict[str, Any]:
        """The stage objects of this layer by name."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **_: object) -> dict[str, Any]:
        table = html.table(self._said())
        return html.mimebundle(repr(self), html.card(f"layers[{self.index}]", table))

    def __repr__(self) -> str:
        head = f"{type(self).__name__}(layer {self.index}, {html.byte_size(self.nbytes)})"
        return html.wrapped(
            "\n".join([head, *(f"  {name}: {said}" for name, said in self._said())])
        )

    def _said(self) -> list[tuple[str, str]]:
        """Each stage's repr, on one line."""
        return [(name, " ".join(repr(stage).split())) for name, stage in self.stages().items()]


class DenseBlock(Block):
    """A leading layer without experts."""

    def __init__(self, *common: Any, mlp: MLP) -> None:
        super().__init__(*common)
        self.mlp = mlp

    def feed_forward(self, hidden_TD: Tensor, probe: Probe, later: Later | None = None) -> Tensor:
        with probe.stage(f"layers.{self.index}.mlp"):
            output_TD = self.mlp.forward(hidden_TD)
        probe.record(f"layers.{self.index}.mlp.output", output_TD)
        return output_TD

    def stages(self) -> dict[str, Any]:
        return {"attention": self.attention, "mlp": self.mlp}

    def _absent(self, stage: str) -> NoReturn:
        config = self.config
        moe = f"{config.first_dense_layers} to {config.num_layers - 1}"
        raise StageError(
            f"layer {self.index} of {config.name} is dense and has no {stage}; the layers with "
            f"experts are {moe}"
        )

    @property
    def router(self) -> Router:
        self._absent("router")

    @property
    def experts(self) -> ExpertBank:
        self._absent("experts")

    @property
    def shared(self) -> MLP:
        self._absent("shared expert")


class MoEBlock(Block):
    """A layer whose feed-forward part is routed experts and a shared one."""

    def __init__(
        self, *common: Any, router: Router, experts: ExpertBank, shared: MLP | None
    ) -> None:
        super().__init__(*common)
        self.router = router
        self.experts = experts
        self.shared = shared

    def feed_forward(self, hidden_TD: Tensor, probe: Probe, later: Later | None = None) -> Tensor:
        name = f"layers.{self.index}"
        with probe.stage(f"{name}.router"):
            routing = self.router.forward(hidden_TD)
        ids_TK = routing.ids_TK
        if later is not None:
            ids_TK, light_TK = split(ids_TK, routing.weights_TK, self.deferred)
            later.leave(partial(self._light, hidden_TD, light_TK, routing.weights_TK, probe))
        with probe.stage(f"{name}.experts"):
            routed_TD = self.experts.forward(hidden_TD, ids_TK, routing.weights_TK)
        probe.record(f"{name}.router.logits", routing.logits_TE)
        probe.record(f"{name}.router.scores", routing.scores_TE)
        probe.record(f"{name}.router.ids", routing.ids_TK)
        probe.record(f"{name}.router.weights", routing.weights_TK)
        probe.record(f"{name}.experts.output", routed_TD)
        if self.shared is None:
            return routed_TD
        with probe.stage(f"{name}.shared"):
            shared_TD = self.shared.forward(hidden_TD)
        probe.record(f"{name}.shared.output", shared_TD)
        return routed_TD + shared_TD

    def _light(
        self, hidden_TD: Tensor, light_TK: Tensor, weights_TK: Tensor, probe: Probe, to: Seat
    ) -> Tensor:
        """What the next layer adds, there."""
        name = f"layers.{self.index}.deferred"
        with probe.stage(name):
            light_TD = self.experts.forward(hidden_TD, light_TK, weights_TK)
        probe.record(f"{name}.output", light_TD)
        return to.take(light_TD)

    def stages(self) -> dict[str, Any]:
        stages = {"attention": self.attention, "router": self.router, "experts": self.experts}
        return stages if self.shared is None else {**stages, "shared": self.shared}


PLAIN = (DenseBlock, MoEBlock)
"""What a native call knows; a subclass is run stage by stage."""

Layer = DenseBlock | MoEBlock
"""Both answer to `.router`, `.experts` and `.shared`; a dense one by saying what it is."""
