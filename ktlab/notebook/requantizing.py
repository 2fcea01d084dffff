"""Sizes, errors and copies of a model in other formats, component by component. No widgets.

Components are those of `override(quantize=...)`: experts, attention, shared, dense, output.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ktlab.errors import SettingError
from ktlab.experts.bank import ExpertBank
from ktlab.kernels.linear import Linear
from ktlab.model.components import COMPONENTS, component_stages, products_of
from ktlab.model.copies import check_formats
from ktlab.model.settings import formatted
from ktlab.quantization import QTensor, fallback_format
from ktlab.quantization.qtensor import QuantizationError

if TYPE_CHECKING:
    import pandas as pd

    from ktlab.model.model import Model

Formats = Mapping[str, str] | Mapping[str | int, str]
"""Component, or layer for its experts -> format: what `override(quantize=...)` takes."""
QUICK_WEIGHTS = 6e8
"""Weights that two cores requantize within a quarter of a minute, to half a gigabyte; of a larger
model an instrument begins with the experts of some layers."""
SAMPLED_ROWS = 1024
"""Rows of each tensor from which an error is estimated, spread over the whole tensor."""


def stage_tensors(stage: Any) -> dict[str, QTensor]:
    """The matrices of an ExpertBank, MLA, MLP or Linear, by name."""
    if isinstance(stage, ExpertBank):
        return {"gate": stage.gate, "up": stage.up, "down": stage.down}
    if isinstance(stage, Linear):
        return {"weight": stage.weight}
    return {name: linear.weight for name, linear in stage.linears.items()}


def component_tensors(model: "Model") -> dict[str, list[tuple[str, QTensor]]]:
    """Every matrix that can change its format: component -> (kind, tensor) over all layers."""
    found: dict[str, list[tuple[str, QTensor]]] = {}
    for component, holder, name in component_stages(model):
        tensors = stage_tensors(getattr(holder, name))
        found.setdefault(component, []).extend(tensors.items())
    return found


def planned_bytes(model: "Model", formats: Formats) -> int:
    """Bytes of the weights with `formats` by component or layer, from shapes alone."""
    unknown = [c for c in formats if c not in COMPONENTS and not isinstance(c, int)]
    if unknown:
        raise SettingError(f"components {unknown}: expected some of {', '.join(COMPONENTS)}")
    total = model.nbytes
    for _, holder, name, wanted in formatted(model, formats):
        for tensor in stage_tensors(getattr(holder, name)).values():
            row = tensor.shape[-1]
            format = fallback_format(wanted, row)
            total += tensor.size // row * format.row_bytes(row) - tensor.nbytes
    return total


def requantize_all(
    model: "Model", formats: Formats, cancel: threading.Event | None = None
) -> Iterator[tuple[int, int]]:
    """Make the copies that `override(quantize=formats)` needs: yields (stages done, of how many).

    Afterwards the override is instant; clones share the copies. Stops early when cancelled.
    `SettingError` before the first one where they would not fit in memory.
    """
    found = [(c, getattr(h, name), format) for c, h, name, format in formatted(model, formats)]
    check_formats(model, [(c, products_of(stage), format) for c, stage, format in found])
    for done, (_, stage, format) in enumerate(found, 1):
        if cancel is not None and cancel.is_set():
            return
        model.requantized(stage, format)
        yield done, len(found)


def some_layers(model: "Model", weights: float = QUICK_WEIGHTS) -> tuple[int, ...]:
    """Layers, spread evenly, whose experts have about `weights` weights; () if all have no more."""
    blocks = model.moe_blocks
    each = sum(stack.size for stack in blocks[0].experts.stacks) if blocks else 0
    if each * len(blocks) <= weights:
        return ()
    count = max(1, int(weights // each))
    step = len(blocks) / count
    return tuple(blocks[int((i + 0.5) * step)].index for i in range(count))


@dataclass(frozen=True, kw_only=True)
class KindError:
    """Error of one kind of matrix in one format, over all layers."""

    component: str
    kind: str
    wanted: str
    format: str
    """What was really used: rows that do not fit `wanted` fall back as in llama.cpp."""
    relative_rmse: float
    snr_db: float
    bits_per_weight: float
    rows: int
    """Rows it was estimated from."""


def sampled(tensor: QTensor, rows: int) -> QTensor:
    """About `rows` rows of a tensor, spread evenly over it, as a matrix."""
    flat = tensor.blocks.reshape(-1, tensor.blocks.shape[-1])
    step = max(1, len(flat) // max(1, rows))
    blocks = flat[::step]
    return QTensor(
        name=tensor.name,
        format=tensor.format,
        shape=(len(blocks), tensor.shape[-1]),
        blocks=blocks,
        source=tensor.source,
    )


def kind_errors(
    model: "Model", formats: Sequence[str], *, rows: int = SAMPLED_ROWS
) -> list[KindError]:
    """Error of every kind of matrix in every format, against the weights as loaded."""
    found = []
    for component, tensors in component_tensors(model).items():
        kinds: dict[str, list[QTensor]] = {}
        for kind, tensor in tensors:
            kinds.setdefault(kind, []).append(sampled(tensor, rows // max(1, len(model.layers))))
        for kind, samples in kinds.items():
            for wanted in formats:
                format = fallback_format(wanted, samples[0].shape[-1])
                errors = [sample.error(format) for sample in samples]
                found.append(_pooled(component, kind, wanted, errors, samples))
    return found


def _pooled(
    component: str,
    kind: str,
    wanted: str,
    errors: Sequence[QuantizationError],
    samples: Sequence[QTensor],
) -> KindError:
    # Each layer counts alike: the mean of the relative squared errors.
    relative = (sum(e.relative_rmse**2 for e in errors) / len(errors)) ** 0.5
    snr = sum(e.snr_db for e in errors) / len(errors)
    return KindError(
        component=component,
        kind=kind,
        wanted=wanted,
        format=errors[0].format,
        relative_rmse=relative,
        snr_db=snr,
        bits_per_weight=errors[0].bits_per_weight,
        rows=sum(s.shape[0] for s in samples),
    )


def error_frame(errors: Sequence[KindError]) -> "pd.DataFrame":
    """Relative error in per cent: a row a matrix, a column a format, with what it fell back to."""
    import pandas as pd

    rows: dict[str, dict[str, str]] = {}
    for e in errors:
        mark = "" if e.format == e.wanted else f" ({e.format})"
        rows.setdefault(f"{e.component} {e.kind}", {})[e.wanted] = f"{e.relative_rmse:.2%}{mark}"
    return pd.DataFrame.from_dict(rows, orient="index")
