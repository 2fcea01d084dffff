"""What can be wrong with a trace or with what is asked of it, in words; and how traces join.

Letters: T tokens, K selected.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ktlab.errors import TraceError, nearest

if TYPE_CHECKING:
    from ktlab.model.trace import Trace


def why_not(trace: "Trace", name: str) -> str:
    """Why `name` is not here, and what to do."""
    parts, layers = name.split("."), trace.model.moe_layers
    what = f'the trace of {trace.model.name} has no "{name}"'
    if len(parts) > 2 and parts[0] == "layers" and parts[1].isdigit():
        layer = int(parts[1])
        if parts[2] in ("router", "experts", "shared") and layer not in layers and layers:
            if layer < max(layers):
                return f"{what}: layer {layer} is dense and has no router or experts"
            return f"{what}: the last layer is {max(layers)}"
    return (
        f"{what}{nearest(name, trace.names)}; it holds {', '.join(trace.names) or 'nothing'}; "
        f'record it with model.trace(text, names=["{name}"])'
    )


def wrong_lengths(trace: "Trace") -> list[str]:
    count = len(trace.ids_T)
    lengths = {name: np.shape(array)[:1] for name, array in trace.arrays.items()}
    lengths |= {"ids_T": trace.ids_T.shape, "segment_T": trace.segment_T.shape}
    if trace.domain_T is not None:
        lengths["domain_T"] = trace.domain_T.shape
    return [
        f"{name} is for {found[0] if found else 'no'} tokens, expected {count}"
        for name, found in lengths.items()
        if found != (count,)
    ]


def wrong_ids(trace: "Trace") -> list[str]:
    problems, most = [], trace.model.num_experts
    for name, ids_TK in trace.arrays.items():
        if not name.endswith(".router.ids"):
            continue
        if ids_TK.ndim != 2 or not np.issubdtype(ids_TK.dtype, np.integer):
            problems.append(f"{name} is {ids_TK.dtype} {ids_TK.shape}, expected integer (T, K)")
        elif ids_TK.size and (ids_TK.min() < -1 or ids_TK.max() >= most):
            found = f"{ids_TK.min()}..{ids_TK.max()}"
            problems.append(f"{name} names experts {found}, expected -1..{most - 1}")
        else:
            ordered = np.sort(ids_TK, axis=1)
            if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
                problems.append(f"{name} names an expert twice for one token")
    return problems


def cannot_join(trace: "Trace", number: int, other: Any) -> list[str]:
    if not isinstance(other, type(trace)):
        return [f"number {number} is a {type(other).__name__}, expected a Trace"]
    problems = []
    if other.model.fingerprint != trace.model.fingerprint:
        problems.append(f"number {number} is of {other.model.name}, not of {trace.model.name}")
    if dict(other.settings) != dict(trace.settings):
        problems.append(
            f"number {number} has settings {dict(other.settings)}, not {dict(trace.settings)} "
            "(compare them with trace.routing.divergence instead)"
        )
    if differ := set(trace.names) ^ set(other.names):
        problems.append(
            f"number {number} differs in {', '.join(sorted(differ, key=by_number))} "
            "(record both with the same names=...)"
        )
    return problems


def by_number(name: str) -> list[tuple[bool, int, str]]:
    return [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in name.split(".")]


def need_known(kind: str, wanted: Sequence[str], known: Sequence[str], hint: str) -> None:
    unknown = [w for w in wanted if w not in known]
    if unknown:
        raise TraceError(
            f"unknown {kind} {', '.join(unknown)}{nearest(unknown[0], known)}; this trace has "
            f"{', '.join(known) or 'none: its texts carry no label'}; {hint}"
        )


def joined(name: str, parts: list[NDArray]) -> NDArray:
    """Parts one after the other; selections of different width are filled up with -1 or 0."""
    if name.endswith((".router.ids", ".router.weights")):
        width, empty = max(part.shape[1] for part in parts), -1 if name.endswith("ids") else 0
        parts = [
            np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=empty)
            for part in parts
        ]
    return np.concatenate(parts)
