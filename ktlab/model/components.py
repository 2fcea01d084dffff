"""The parts of a model that hold matrices: by component, by stage, by what kernels compute."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ktlab.experts.bank import ExpertBank
from ktlab.kernels.computed import Computed
from ktlab.kernels.linear import Linear
from ktlab.model.block import MoEBlock

if TYPE_CHECKING:
    from ktlab.model.model import Model

COMPONENTS = ("attention", "dense", "experts", "shared", "output")
"""What `quantize=` can name; `experts` is what a bare format means."""


def component_stages(model: "Model") -> Iterator[tuple[str, Any, str]]:
    """(component, object that holds it, attribute) of everything that `quantize=` can change."""
    for block in model.layers:
        yield "attention", block, "attention"
        if isinstance(block, MoEBlock):
            yield "experts", block, "experts"
            if block.shared is not None:
                yield "shared", block, "shared"
        else:
            yield "dense", block, "mlp"
        for name in block.in_prefill:
            yield "dense" if name == "mlp" else name, block.in_prefill, name
    yield "output", model, "output"


def products_of(stage: Any) -> list[Computed]:
    """What kernels compute in a stage: the bank, or its matrices."""
    if isinstance(stage, ExpertBank):
        return [stage]
    return [stage] if isinstance(stage, Linear) else list(stage.linears.values())


def every_product(model: "Model") -> Iterator[Computed]:
    """All that kernels compute, as it is set now."""
    for _, holder, name in component_stages(model):
        yield from products_of(getattr(holder, name))
