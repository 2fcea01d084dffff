"""Placements by name, for a button or a word on a command line: made for whichever model asks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ktlab.checkpoint.config import ModelConfig
from ktlab.errors import PlacementError, nearest
from ktlab.placement.machine import CPU, GPU
from ktlab.placement.placed import ON_CPU
from ktlab.placement.placement import PLACEABLE, Placement

if TYPE_CHECKING:
    from ktlab.model.model import Model

EVERY = 4
PRESETS = {
    "cpu": "everything on the CPU, as loaded",
    "gpu": "all but routed experts and embedding on cuda:0 (KTransformers' rule)",
    "gpu + experts": f"the same, and one in {EVERY} of each layer's routed experts",
}


@dataclass(frozen=True)
class Preset:
    """A name of `PRESETS`; `model.place` and `override(placement=...)` take it."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in PRESETS:
            raise PlacementError(
                f"no placement is called {self.name!r}{nearest(self.name, PRESETS)}; there are "
                f"{', '.join(PRESETS)}"
            )

    def placement(self, model: "Model") -> Placement:
        """Of this model."""
        return self.of(model.config)

    def of(self, config: ModelConfig) -> Placement:
        """Of a model of this shape."""
        found = Placement.everywhere(config, CPU)
        if self.name == "cpu":
            return found
        for component in PLACEABLE:
            if component not in ON_CPU and found.model.layers_of(component):
                found = found.put(component, GPU)
        if self.name == "gpu + experts":
            found = found.put("experts", GPU, experts=range(0, found.model.experts, EVERY))
        return found


def stand_ins() -> dict[str, str]:
    """What computes in a GPU's stead here: nothing where torch finds one."""
    import torch

    return {} if torch.cuda.is_available() else {GPU: CPU}
