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
    """Weights and bytes of each component that can be requantized."""
    import pandas as pd

    rows = []
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
    fig.add_scatter(
        x=ends, y=[best.snr_db + DB_PER_BIT * (bits - best.bits_per_weight) for bits in ends],
        mode="lines", line={"dash": "dot", "color": figures.INK, "width": 1}, hoverinfo="skip",
    )  # fmt: skip
    sides = label_sides([(e.bits_per_weight, e.snr_db) for e in found], [e.format for e in found])
    fig.add_scatter(
        x=[e.bits_per_weight for e in found], y=[e.snr_db for e in found],
        text=[f" {e.format} " for e in found], mode="markers+text", textposition=sides,
        marker={"size": 9, "color": figures.BLUE}, textfont={"color": figures.INK},
        hovertemplate="%{text}: %{x:.4g} bits, %{y:.1f} dB<extra></extra>",
    )  # fmt: skip
    room = 0.5  # bits, for a name beside the outermost points
    fig.update_xaxes(range=[found[0].bits_per_weight - room, found[-1].bits_per_weight + room])
    return fig.update_layout(showlegend=False)


def label_sides(places: Sequence[tuple[float, float]], names: Sequence[str]) -> list[str]:
    """For each point the side on which its name meets fewest points and earlier names."""
    at = np.asarray(places, float)
    at_px = (at - at.min(0)) / np.maximum(np.ptp(at, axis=0), 1e-9) * PLOT_PX
    taken = [(x, y, *POINT_PX) for x, y in at_px]
    sides = []
    for (x, y), name in zip(at_px, names, strict=True):
        wide, high = 7 * len(name), 14
        boxes = {
            side: (x + dx * (wide / 2 + 8), y + dy * high, wide, high)
            for side, (dx, dy) in SIDES.items()
        }
        own = (x, y, *POINT_PX)
        met = {side: sum(_meet(box, o) for o in taken if o != own) for side, box in boxes.items()}
        sides.append(min(met, key=lambda side: met[side]))
        taken.append(boxes[sides[-1]])
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
