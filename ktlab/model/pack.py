"""Packing a whole model: every matrix that kernels compute, one after the other."""

from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from ktlab.errors import SettingError
from ktlab.kernels.pack_run import PackedTensor, PackReport
from ktlab.kernels.packed_file import PackCache, file_identity
from ktlab.kernels.threads import default_threads
from ktlab.model.components import every_product

if TYPE_CHECKING:
    from ktlab.model.model import Model


def pack_model(
    model: "Model", *, cache: str | PathLike[str] | None, threads: int | None
) -> PackReport:
    """See `Model.pack`."""
    folder = PackCache(fspath(cache)) if cache is not None else None
    path = model.checkpoint.path
    identity = _identity(path) if folder is not None and path is not None else ""
    packed: list[PackedTensor] = []
    left: dict[str, str] = {}
    for block in model.layers:
        block.let_go()  # or the blocks that packing lets go would stay
    for product in every_product(model):
        try:
            report = product.pack(folder, identity=identity, threads=threads)
        except SettingError as error:  # no kernel computes a format of it
            left.update({stack.name: str(error) for stack in product.stacks})
            continue
        packed += report.tensors
    return PackReport(tensors=tuple(packed), left=left, threads=threads or default_threads())


def _identity(path: Path) -> str:
    """Of a model's file, or of all files in its folder."""
    if path.is_file():
        return file_identity(path)
    return ":".join(file_identity(file) for file in sorted(path.iterdir()) if file.is_file())
