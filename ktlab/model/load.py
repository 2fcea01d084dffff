"""`ktlab.load`: from a name or a file to a model."""

from collections.abc import Mapping
from os import PathLike, fspath

from ktlab.checkpoint.checkpoint import Checkpoint
from ktlab.checkpoint.converted import ConvertedCheckpoint
from ktlab.checkpoint.opening import open_checkpoint
from ktlab.model.model import Model


def load(
    path_or_name: "str | PathLike[str]", *, convert: "Mapping[str, str] | None" = None
) -> Model:
    """The embedded model ("tiny") or a GGUF file of architecture deepseek2, memory-mapped.

    `convert` turns matrices of some formats into others while loading: {"iq1_m": "q8_0"} because no
    fast kernel computes iq1_m, {"bf16": "int8_channel"} because 8-bit products are faster.
    Raises `CheckpointError` with everything that is wrong with the file.
    """
    checkpoint: Checkpoint = open_checkpoint(fspath(path_or_name))
    return Model(ConvertedCheckpoint(checkpoint, convert) if convert else checkpoint)
