"""Copies of weights that a switch makes: counted beforehand, refused where there is no room.

Another format makes a second copy of what it names, `layout="packed"` one of what kernels read, and
`backend="torch"` float32 copies, seven times a 4-bit file. On a large model that ends a process
without a word; so nothing is allocated before the bytes are known to fit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ktlab.checkpoint.facts import model_files
from ktlab.errors import SettingError
from ktlab.experts.bank import ExpertBank
from ktlab.html import decimal_bytes
from ktlab.kernels.computed import Computed
from ktlab.kernels.request import PACKED
from ktlab.memory import memory, trim
from ktlab.model.components import every_product
from ktlab.quantization import fallback_format, get_format

if TYPE_CHECKING:
    from ktlab.model.model import Model

FLOAT_BYTES = 4
KEPT_SHARE = 4
"""Where memory cannot hold the file anyway, copies may still take one part in so many."""
UNUSED_BYTES, UNUSED_SHARE = 256 << 20, 64
"""Copies that nobody uses now are kept for a toggle back while all take no more than this, or one
part in so many of the room: a small model's all, of a large one the latest."""


def room(model: "Model") -> int | None:
    """Bytes that copies may take now: what is available beside the model's own file, which would
    otherwise come from disk for every token. None where the system does not say."""
    found = memory()
    sizes = [size for size in (found.available, found.limit) if size is not None]
    if not sizes:
        return None
    path = model.checkpoint.path
    files = () if path is None else model_files(path)
    available = min(sizes)
    return max(available - sum(file.stat().st_size for file in files), available // KEPT_SHARE)


def format_bytes(product: Computed, format: str) -> int:
    """Bytes that `product.quantized(format)` would allocate; 0 if it has been made before."""
    if format in product.kept_formats:
        return 0
    total = 0
    for stack in product._stored:
        row = stack.shape[-1]
        fitting = fallback_format(format, row)
        if fitting != stack.format:
            total += stack.size // row * fitting.row_bytes(row)
    return total


def prepared_bytes(products: Iterable[Computed]) -> int:
    """Bytes that the kernels chosen now would still make of the weights at their first call.

    Where none is chosen yet, none is: what is asked for may not go with a format that is new.
    """
    total = 0
    for product in products:
        kernel = product._kernel
        if kernel is None:
            continue
        for stack in product.stacks:
            made = stack.operand_bytes
            if kernel.backend == "torch":
                total += FLOAT_BYTES * stack.size if "float32" not in made else 0
            elif kernel.layout == PACKED and PACKED not in made:
                total += stack.nbytes
    return total


def check_formats(model: "Model", wanted: Iterable[tuple[str, Sequence[Computed], str]]) -> None:
    """`SettingError` if copies in other formats do not fit; (component, its products, format).

    Copies that are not wanted are let go first, where they do not fit or take much.
    """
    wanted = list(wanted)
    needed: dict[str, int] = {}
    for component, products, format in wanted:
        found = sum(format_bytes(product, format) for product in products)
        if found:
            name = f"{component} as {format}"
            needed[name] = needed.get(name, 0) + found
    if not needed:
        return
    total, free = sum(needed.values()), room(model)
    if free is not None:
        if total > free or total + kept_bytes(model) > unused(free):
            let_go(model, wanted)
    refuse(model, total, " and ".join(needed), "another copy of these weights")


def unused(free: int | None) -> int:
    """Bytes that copies which nobody uses may keep."""
    return max(UNUSED_BYTES, (free or 0) // UNUSED_SHARE)


def kept_bytes(model: "Model") -> int:
    """Bytes of all copies in other formats, with what kernels made of them."""
    return sum(
        stack.block_bytes + sum(stack.operand_bytes.values())
        for product in every_product(model)
        for stack in product.requantized
    )


@contextmanager
def passing(model: "Model") -> Iterator[None]:
    """Copies that are made meanwhile, in other formats or for kernels, are forgotten at the end."""
    before = [(s, s.operands) for product in every_product(model) for s in product.stacks]
    try:
        yield
    finally:
        for stack, operands in before:
            stack.forget(operands)
        let_go(model, [])


def let_go_unused(model: "Model") -> None:
    """Forget all copies in other formats where they take much: nobody is about to ask for them."""
    if kept_bytes(model) > unused(room(model)):
        let_go(model, [])


def let_go(model: "Model", wanted: Iterable[tuple[str, Sequence[Computed], str]]) -> None:
    """Forget all copies but those of these products in these formats."""
    keep: dict[int, list[str]] = {}
    for _, products, format in wanted:
        for product in products:
            keep.setdefault(id(product._requantized), []).append(format)  # clones share it
    for product in every_product(model):
        product.let_go(keep.get(id(product._requantized), ()))
    trim()


def check_prepared(model: "Model", before: int, products: Iterable[Computed]) -> None:
    """`SettingError` if what kernels would make, `before` bytes until now, grew beyond the room."""
    needed = prepared_bytes(products)
    if needed > before:
        refuse(model, needed, "this backend or layout", "copies for the kernels")


def check_use(
    model: "Model", banks: Sequence[ExpertBank], words: Mapping[str, Any]
) -> Callable[[], None]:
    """`ExpertBanks.use` asks before it changes anything, and what this returns once it has."""
    model.checkpoint.check_unchanged()
    if (format := words.get("format")) is not None:
        check_formats(model, [("experts", list(banks), get_format(format).name)])
    before = prepared_bytes(banks)
    return lambda: check_prepared(model, before, banks)


def refuse(model: "Model", needed: int, what: str, copies: str) -> None:
    """`SettingError` unless `needed` bytes fit."""
    free = room(model)
    if free is None or needed <= free:
        return
    layers = [block.index for block in model.moe_blocks]
    raise SettingError(
        f"{model.name}: {what} needs {decimal_bytes(needed)} for {copies}, and "
        f"{decimal_bytes(free)} are free beside the model; nothing was changed. Name fewer layers, "
        f"such as {{{layers[len(layers) // 2]}: ...}} instead of a bare word, or a component "
        "without the experts"
    )
