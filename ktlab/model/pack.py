"""Packing a whole model: every matrix that kernels compute, one after the other."""

from os import PathLike, fspath
from typing import TYPE_CHECKING

from ktlab.errors import SettingError
from ktlab.kernels.pack_run import PackedTensor, PackReport
from ktlab.kernels.packed_file import PackCache, file_identity
from ktlab.kernels.threads import check_threads, default_threads
from ktlab.model.components import every_product

if TYPE_CHECKING:
    from ktlab.model.model import Model


def pack_model(
    model: "Model", *, cache: str | PathLike[str] | None, threads: int | None
) -> PackReport:
    """See `Model.pack`."""
    check_threads(threads)
    folder = PackCache(fspath(cache)) if cache is not None else None
    files = model.checkpoint.files if folder is not None else ()
    identity = ":".join(map(file_identity, files))
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
