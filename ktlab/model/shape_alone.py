"""A model of which only the header is there: every stage with its formats and sizes, no weights.

To ask of a model that one does not have what rules would do to it. Its tensors are one byte that is
everywhere, so that 671 billion parameters take no memory.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np

from ktlab.checkpoint.checkpoint import CheckpointView
from ktlab.checkpoint.facts import ModelFacts
from ktlab.checkpoint.names import Shape, expected_tensors
from ktlab.checkpoint.tokenizer import Tokenizer
from ktlab.errors import CheckpointError
from ktlab.model.model import Model
from ktlab.quantization import QTensor, get_format


def shape_alone(facts: ModelFacts) -> Model:
    """A model that can be looked at, previewed and placed in thought, but not run."""
    return Model(_Shapes(facts))


class _Shapes(CheckpointView):
    tokenizer: Tokenizer | None = None
    metadata: Mapping[str, object] = {}
    path: Path | None = None

    def __init__(self, facts: ModelFacts) -> None:
        self.name, self.config = facts.name, facts.config
        self._formats = {tensor.name: tensor.format for tensor in facts.tensors}

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        return expected_tensors(self.config)

    def names(self) -> list[str]:
        return list(self._shapes)

    def tensor(self, name: str) -> QTensor:
        shape = self._shapes[name]
        # An older file has k_b and v_b as one matrix.
        fused = name.replace("attn_k_b", "attn_kv_b").replace("attn_v_b", "attn_kv_b")
        found = get_format(self._formats.get(name) or self._formats.get(fused, "f32"))
        row = shape[-1]
        format = found if row % found.block_size == 0 else get_format("f32")
        blocks = np.broadcast_to(np.zeros(1, np.uint8), (*shape[:-1], format.row_bytes(row)))
        return QTensor(name=name, format=format, shape=shape, blocks=blocks, source="its header")

    def check_unchanged(self) -> None:
        raise CheckpointError(
            f"{self.name}: only its header was read, there are no weights to compute with; load a "
            "file of it"
        )
