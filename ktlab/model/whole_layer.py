"""A decoded token through whole layers in one native call: nothing of Python between their stages.

For a small model what lies between the operations takes more time than they do, and a large model's
weights push Python's own data out of the cache, so that what lies between two layers takes 0.3 ms.
What happens is the same as stage by stage (`Block.forward`), which is also what runs whenever
somebody watches the stages, or a stage, a rule or a kernel is not one that the C core knows.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ktlab.attention.cache import LayerCache
from ktlab.attention.mla import MLA, WholeToken
from ktlab.experts.bank import ExpertBank
from ktlab.experts.mlp import MLP
from ktlab.kernels import dispatch, native, products
from ktlab.kernels.request import Kernel
from ktlab.kernels.stack import Stack
from ktlab.routing.router import Router
from ktlab.routing.rules import FixedK

if TYPE_CHECKING:
    from ktlab.model.block import Block

Made = tuple[Any, list[Kernel]]
"""An object of the C core and the kernels that it stands for."""


class WholeLayer:
    """One layer as it was when this was made; `of` makes another once something has changed."""

    def __init__(self, block: "Block", state: tuple[Any, ...]) -> None:
        self._state = state
        self._token: WholeToken | None = None
        self._operand: Any = None
        attention = block.attention
        token = attention.whole_token() if type(attention) is MLA else None
        parts = _feed_forward(block.stages()) if token is not None else None
        if token is None or parts is None:
            return
        router, routed, shared, kernels = parts
        if native.together([*token.kernels, *kernels]):
            self._token = token
            self._operand = native.core().Layer(
                token.kernel.isa,
                block.attention_norm_D.numpy(),
                token.operand,
                block.mlp_norm_D.numpy(),
                router,
                routed,
                shared,
            )

    @staticmethod
    def of(block: "Block", known: "WholeLayer | None") -> "WholeLayer":
        """`known`, if it is still what the layer is."""
        state = _state(block)
        if known is None or known._state != state:
            return WholeLayer(block, state)
        return known

    @property
    def usable(self) -> bool:
        """Whether one call can do the layer's work."""
        return self._operand is not None

    @staticmethod
    def together(layers: "Sequence[WholeLayer]") -> bool:
        """Whether one call can do the work of all these usable layers."""
        return native.together(
            [layer._token.kernel for layer in layers if layer._token is not None]
        )

    @staticmethod
    def through(
        layers: "Sequence[WholeLayer]",
        caches: Sequence[LayerCache],
        hidden_11D: Tensor,
        positions_11: Tensor,
    ) -> Tensor:
        """(1, 1, D) to (1, 1, D) through usable layers that are `together`; writes their caches."""
        tokens = [layer._token for layer in layers if layer._token is not None]
        places = [token.place(c, positions_11) for token, c in zip(tokens, caches, strict=True)]
        y_D = native.layers_token(
            tokens[0].kernel,
            [layer._operand for layer in layers],
            [turns for _, turns in places],
            hidden_11D.reshape(-1),
            [keys_SC for keys_SC, _ in places],
        )
        return y_D.view(1, 1, -1)


def _state(block: "Block") -> tuple[Any, ...]:
    """All that may be switched or replaced, to be compared; objects that are made anew on a change
    are compared by what they are, others by their values."""
    attention = block.attention
    found: list[Any] = [attention, attention.whole_token() if type(attention) is MLA else None]
    for stage in block.stages().values():
        if isinstance(stage, ExpertBank):
            found += (stage, stage.kernel, stage.stacks)
        elif isinstance(stage, MLP):
            found += (stage, *(linear.kernel for linear in stage.linears.values()))
        elif isinstance(stage, Router):
            found += (stage, stage.gate.request, stage.rule, stage.mask, stage.force)
    return tuple(found)


def _feed_forward(stages: dict[str, Any]) -> tuple[Any, Any, Any, list[Kernel]] | None:
    """The core's router (None in a dense layer), routed and shared experts, and all kernels."""
    if "mlp" in stages:
        dense = _shared(stages["mlp"])
        return None if dense is None else (None, dense[0], None, dense[1])
    router, routed = _router(stages["router"]), _experts(stages["experts"])
    shared: Made | None = (None, [])
    if "shared" in stages:
        shared = _shared(stages["shared"])
    if router is None or routed is None or shared is None:
        return None
    return router[0], routed[0], shared[0], [*router[1], *routed[1], *shared[1]]


def _experts(bank: Any) -> Made | None:
    return _feed(bank.kernel, bank.stacks) if type(bank) is ExpertBank else None


def _shared(mlp: Any) -> Made | None:
    if type(mlp) is not MLP or not mlp.alike:
        return None
    return _feed(mlp.gate.kernel, mlp.stacks)


def _feed(kernel: Kernel, stacks: tuple[Stack, Stack, Stack]) -> Made | None:
    if kernel.backend != "native":
        return None
    matrices = [products.native_matrix(kernel, stack) for stack in stacks]
    return native.core().Experts(kernel.isa, kernel.few, *matrices), [kernel]


def _router(router: Any) -> Made | None:
    if type(router) is not Router or type(router.rule) is not FixedK:
        return None
    if router.mask or router.force:
        return None
    kernel = dispatch.choose(router.gate.request, ("f32",))
    if kernel.backend != "native":
        return None
    config = router.config
    made = native.core().Router(
        kernel.isa,
        products.native_floats(router.gate.stack),
        None if router.bias_E is None else router.bias_E.numpy(),
        config.gating == "sigmoid",
        config.norm_topk_prob,
        max(1, config.n_group),
        config.topk_group if config.n_group > 1 else 1,
        router.rule.k,
        config.routed_scaling_factor,
    )
    return made, [kernel]
