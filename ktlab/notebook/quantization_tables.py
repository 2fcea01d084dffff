"""Tables and plots of notebook 05: formats, where the bytes are, what they are worth."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ktlab import figures
from ktlab.notebook.quantization_plane import Tried, named
from ktlab.notebook.requantizing import component_tensors
from ktlab.quantization import FORMATS, QTensor

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from ktlab.model.model import Model

DB_PER_BIT = 6.02
"""A bit more halves the step of a uniform quantizer: 20 log10(2)."""


PLOT_PX, POINT_PX = (560, 280), (9, 9)
"""The area between the outermost points, as on a narrow page, and one point."""
CROWD, LINE_SAMPLES = 3, 20
"""So many points at the same bits have their names in one stack; points that stand for a line."""
LEADER_PX = np.array((36, -34))
SIDES = {"middle right": (1, 0), "middle left": (-1, 0), "top center": (0, 1),
         "bottom center": (0, -1), "top right": (1, 1), "bottom left": (-1, -1),
         "top left": (-1, 1), "bottom right": (1, -1)}  # fmt: skip


def formats_frame() -> "pd.DataFrame":
    """Every format, most bits first."""
    import pandas as pd

    rows = [
        {
            "format": f.name,
            "bits/weight": f.bits_per_weight,
            "block": f"{f.block_size} in {f.block_bytes} bytes",
            "made here": "yes" if f.can_quantize else "read only",
            "defined in": f.source,
        }
        for f in sorted(FORMATS.values(), key=lambda f: -f.bits_per_weight)
    ]
    return pd.DataFrame(rows).set_index("format")


def component_frame(model: "Model") -> "pd.DataFrame":
    """Weights and bytes of each component that can be requantized, and of the rest."""
    import pandas as pd

    rows: list[dict[str, object]] = []
    for component, found in component_tensors(model).items():
        tensors = [tensor for _, tensor in found]
        stored = sum(tensor.nbytes for tensor in tensors)
        rows.append(
            {
                "component": component,
                "weights": f"{sum(tensor.size for tensor in tensors):,}",
                "MiB as loaded": f"{stored / 2**20:.2f}",
                "share": f"{stored / model.nbytes:.1%}",
                "formats": ", ".join(sorted({tensor.format.name for tensor in tensors})),
            }
        )
    if rest := model.nbytes - sum(
        tensor.nbytes for found in component_tensors(model).values() for _, tensor in found
    ):
        rows.append(
            {
                "component": "embedding, norms",
                "weights": "",
                "MiB as loaded": f"{rest / 2**20:.2f}",
                "share": f"{rest / model.nbytes:.1%}",
                "formats": "stay as they are",
            }
        )
    return pd.DataFrame(rows).set_index("component")


def snr_plot(tensor: QTensor) -> "Figure":
    """Signal over noise of a tensor in every format below 8 bits that fits its rows."""
    fitting = [
        f
        for f in FORMATS.values()
        if f.can_quantize and f.bits_per_weight < 8 and tensor.shape[-1] % f.block_size == 0
    ]
    errors = (tensor.error(f) for f in fitting)
    # A format that gives the stored values back, as its own does, has no error to draw.
    found = sorted(
        (e for e in errors if math.isfinite(e.snr_db)), key=lambda e: (e.bits_per_weight, e.snr_db)
    )
    title = f"{tensor.name}, against {tensor.format.name} as stored"
    fig = figures.figure(title, x="bits per weight", y="signal to noise, dB", height=380)
    best = max(found, key=lambda e: e.snr_db - DB_PER_BIT * e.bits_per_weight)
    ends = [found[0].bits_per_weight - 0.2, found[-1].bits_per_weight + 0.4]

    def slope(bits: float) -> float:
        return float(best.snr_db + DB_PER_BIT * (bits - best.bits_per_weight))

    fig.add_scatter(
        x=ends, y=[slope(bits) for bits in ends], mode="lines", hoverinfo="skip",
        line={"dash": "dot", "color": figures.INK, "width": 1},
    )  # fmt: skip
    stacks = crowds([e.bits_per_weight for e in found])
    stacked = {number for stack in stacks for number in stack}
    alone = [number for number in range(len(found)) if number not in stacked]
    places = [(e.bits_per_weight, e.snr_db) for e in found]
    line = [(bits, slope(bits)) for bits in np.linspace(ends[0], ends[1], LINE_SAMPLES)]
    unit = np.ptp(places, axis=0) / PLOT_PX
    for stack in stacks:  # the thin line from the lowest point to the names
        foot = np.asarray(min(places[n] for n in stack))
        line += [tuple(foot + unit * (LEADER_PX * t)) for t in np.linspace(0, 1, LINE_SAMPLES // 2)]
    sides = dict(zip(alone, label_sides(
        [places[n] for n in alone], [found[n].format for n in alone],
        taken=[*line, *(places[n] for n in sorted(stacked))],
    ), strict=True))  # fmt: skip
    for stack in stacks:
        names = [found[n].format for n in sorted(stack, key=lambda n: -found[n].snr_db)]
        bits, lowest = min(places[n] for n in stack)
        fig.add_annotation(
            x=bits, y=lowest, ax=LEADER_PX[0], ay=-LEADER_PX[1], text="<br>".join(names),
            align="left", xanchor="left",
            yanchor="top", showarrow=True, arrowhead=0, arrowwidth=0.8, arrowcolor=figures.INK,
            font={"color": figures.INK, "size": 11},
        )  # fmt: skip
    fig.add_scatter(
        x=[e.bits_per_weight for e in found], y=[e.snr_db for e in found],
        text=["" if n in stacked else f" {e.format} " for n, e in enumerate(found)],
        customdata=[e.format for e in found], mode="markers+text",
        textposition=[sides.get(n, "middle right") for n in range(len(found))],
        marker={"size": 9, "color": figures.BLUE}, textfont={"color": figures.INK},
        hovertemplate="%{customdata}: %{x:.4g} bits, %{y:.1f} dB<extra></extra>",
    )  # fmt: skip
    room = 0.5  # bits, for a name beside the outermost points
    fig.update_xaxes(range=[found[0].bits_per_weight - room, found[-1].bits_per_weight + room])
    return fig.update_layout(showlegend=False)


def crowds(bits: Sequence[float]) -> list[list[int]]:
    """Numbers of the points that share their bits with so many others that names beside them
    would meet: their names stand in one stack."""
    alike: dict[float, list[int]] = {}
    for number, at in enumerate(bits):
        alike.setdefault(at, []).append(number)
    return [stack for stack in alike.values() if len(stack) >= CROWD]


def label_sides(
    places: Sequence[tuple[float, float]],
    names: Sequence[str],
    taken: Sequence[tuple[float, float]] = (),
) -> list[str]:
    """For each point the side on which its name meets fewest points, earlier names, and places
    that are `taken`: other points, samples of a line."""
    at = np.asarray([*places, *taken], float)
    at_px = (at - at.min(0)) / np.maximum(np.ptp(at, axis=0), 1e-9) * PLOT_PX
    boxes_px = [(x, y, *POINT_PX) for x, y in at_px]
    sides = []
    for (x, y), name in zip(at_px, names, strict=False):
        wide, high = 7 * len(name), 14
        boxes = {
            side: (x + dx * (wide / 2 + 8), y + dy * high, wide, high)
            for side, (dx, dy) in SIDES.items()
        }
        own = (x, y, *POINT_PX)
        met = {
            side: sum(_meet(box, o) for o in boxes_px if o != own) for side, box in boxes.items()
        }
        sides.append(min(met, key=lambda side: met[side]))
        boxes_px.append(boxes[sides[-1]])
    return sides


def _meet(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two boxes (middle, then width and height) overlap."""
    return all(abs(one[i] - other[i]) < (one[i + 2] + other[i + 2]) / 2 for i in (0, 1))


def spent_frame(points: Iterable[Tried], loaded_bytes: int, format: str) -> "pd.DataFrame":
    """What `format` costs in each component per MiB that it saves, cheapest first."""
    import pandas as pd

    rows = []
    for point in points:
        formats = dict(point.formats)
        if len(formats) != 1 or set(formats.values()) != {format}:
            continue
        saved = (loaded_bytes - point.nbytes) / 2**20
        kl = point.quality.kl_mean
        value, low, high = (1e3 * x for x in (kl.value, kl.low, kl.high))
        rows.append(
            {
                "component": named(next(iter(formats)), point.layers),
                "MiB saved": round(saved, 2),
                "KL, millinats": f"{value:.2f} [{low:.2f}, {high:.2f}]",
                "per MiB saved": value / saved,
                "interval": f"[{low / saved:.3g}, {high / saved:.3g}]",
            }
        )
    if not rows:
        return pd.DataFrame(columns=["MiB saved", "KL, millinats", "per MiB saved", "interval"])
    frame = pd.DataFrame(rows).set_index("component").sort_values("per MiB saved")
    frame["per MiB saved"] = frame["per MiB saved"].map("{:.3g}".format)
    return frame
