"""Packing a whole model: every matrix that kernels compute, one after the other."""

from os import PathLike, fspath
from typing import TYPE_CHECKING

from ktlab.errors import SettingError
from ktlab.experts.bank import ExpertBank
from ktlab.kernels import dispatch
from ktlab.kernels.linear import Linear
from ktlab.kernels.pack_run import PackedTensor, PackReport, pack_stacks
from ktlab.kernels.packed_file import PackCache, file_identity
from ktlab.kernels.request import PACKED, Request
from ktlab.kernels.threads import default_threads
from ktlab.model.settings import component_stages, products

if TYPE_CHECKING:
    from ktlab.model.model import Model


def pack_model(
    model: "Model", *, cache: str | PathLike[str] | None, threads: int | None
) -> PackReport:
    """See `Model.pack`."""
    request = Request(threads=threads)
    folder = PackCache(fspath(cache)) if cache is not None else None
    path = model.checkpoint.path
    identity = file_identity(path) if folder is not None and path is not None else ""
    packed: list[PackedTensor] = []
    left: dict[str, str] = {}
    for _, holder, name in component_stages(model):
        for product in products(getattr(holder, name)):
            assert isinstance(product, ExpertBank | Linear)
            stacks = product.stacks if isinstance(product, ExpertBank) else (product.stack,)
            wanted = product.request.with_(layout=PACKED)
            try:
                dispatch.choose(wanted, product.formats)
            except SettingError as error:
                left.update({stack.name: str(error) for stack in stacks})
                continue
            packed += pack_stacks(stacks, request, folder, identity)
            product.request = wanted
    return PackReport(tensors=tuple(packed), left=left, threads=threads or default_threads())
