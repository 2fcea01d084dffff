"""`ktlab.load`: from a name or a file to a model."""

from os import PathLike, fspath

from ktlab.checkpoint.opening import open_checkpoint
from ktlab.model.model import Model


def load(path_or_name: "str | PathLike[str]") -> Model:
    """The embedded model ("tiny") or a GGUF file of architecture deepseek2, memory-mapped.

    Raises `CheckpointError` with everything that is wrong with the file.
    """
    return Model(open_checkpoint(fspath(path_or_name)))
