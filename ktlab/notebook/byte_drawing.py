"""The bytes of quantized rows drawn as they lie in memory, in blocks and packed: HTML from arrays.

Hovering over a byte says which weights it holds and marks the same weights in the other drawing:
by CSS alone, so that a saved page does it too.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ktlab.html import text
from ktlab.kernels import codings, packing
from ktlab.kernels.codings import ALIGN, CHUNK, GROUP, PANEL
from ktlab.kernels.request import Request
from ktlab.notebook.byte_maps import Byte, block_map, drawable, panel_map
from ktlab.notebook.css import style
from ktlab.quantization import QTensor

NAMES = {
    "d": "d: float16, scale of the scales",
    "dmin": "dmin: float16, scale of the minima",
    "scales": "scales of the sub-blocks",
    "mins": "minima of the sub-blocks",
    "codes": "codes, a colour for each 32 columns",
    "high": "upper bits of the codes",
    "padding": "padding",
}
BLOCK_WIDTH = 48


@dataclass(frozen=True, kw_only=True, eq=False)
class Bytes:
    """One panel of 16 rows and 256 columns of a real tensor, in both layouts; `row` is followed."""

    format: str
    name: str
    row: int
    block_bytes: NDArray[np.uint8]
    """Of the followed row."""
    panel_bytes: NDArray[np.uint8]
    values_RC: NDArray[np.float32]

    @classmethod
    def of(cls, tensor: QTensor, row: int = 0) -> "Bytes":
        """The panel of `tensor` (N, K) that holds `row`; its first 256 columns."""
        format = tensor.format.name
        if not drawable(format):
            raise ValueError(f"{format} has no blocks of integer codes to draw; try q4_k")
        if len(tensor.shape) != 2 or tensor.shape[0] < PANEL or tensor.shape[1] < CHUNK:
            raise ValueError(f"{tensor.name} is {tensor.shape}; expected 16 x 256 or more")
        if not 0 <= row < tensor.shape[0] // PANEL * PANEL:
            raise ValueError(f"row {row} of {tensor.shape[0]}: expected one of a whole panel of 16")
        first = row // PANEL * PANEL
        rows = tensor[first : first + PANEL]
        packed = packing.pack(packing.blocks(rows), Request(threads=1))
        chunk = codings.packed_chunk(format, CHUNK // GROUP)
        return cls(
            format=format,
            name=tensor.name,
            row=row,
            block_bytes=rows.blocks[row - first, : codings.CODINGS[format].chunk_bytes],
            panel_bytes=packed.expert(0)[: chunk.bytes],
            values_RC=rows.dequantize()[:, :CHUNK],
        )

    @cached_property
    def codes_RC(self) -> NDArray[np.int64]:
        """Codes of the panel, read from the packed bytes with the map."""
        found = np.zeros((PANEL, CHUNK), np.int64)
        for value, byte in zip(self.panel_bytes.tolist(), panel_map(self.format), strict=True):
            for b in byte.holds:
                found[b.row, b.column] |= (value >> b.shift & (1 << b.count) - 1) << b.to
        return found


def drawing(shown: Bytes, offset: int = 0) -> str:
    """Both drawings with their legend, as one piece of HTML; rows are counted from `offset`."""
    blocks, panel = block_map(shown.format), panel_map(shown.format)
    row = shown.row % PANEL
    first = offset + shown.row - row
    fields = {b.field for b in (*blocks, *panel)}
    legend = "".join(
        f'<span><i class="kb-{name}"></i>{text(meaning)}</span>'
        for name, meaning in NAMES.items()
        if name in fields
    )
    in_blocks = "".join(
        _cell(shown, value, at, byte, row, first, blocks=True)
        for at, (value, byte) in enumerate(zip(shown.block_bytes.tolist(), blocks, strict=True))
    )
    lines = []
    for start in range(0, len(panel), ALIGN):
        cells = "".join(
            _cell(shown, value, start + i, byte, row, first)
            for i, (value, byte) in enumerate(
                zip(
                    shown.panel_bytes[start : start + ALIGN].tolist(),
                    panel[start : start + ALIGN],
                    strict=True,
                )
            )
        )
        lines.append(f"<b>{text(_line_name(panel, start))}</b>{cells}")
    marks = "".join(
        f".kb:has(.w{c}:hover) .w{c}{{outline:2px solid var(--kb-ink);z-index:2;opacity:1}}"
        for c in range(CHUNK)
    )
    return (
        f"{style('byte_drawing')}<style>{marks}</style>"
        f'<div class="kb" data-format="{text(shown.format)}" data-row="{first + row}">'
        f'<div class="kb-legend">{legend}</div>'
        f'<div class="kb-head">in blocks: {len(blocks)} bytes hold 256 columns of row '
        f"{first + row} of {text(shown.name)}</div>"
        f'<div class="kb-grid kb-blocks">{in_blocks}</div>'
        f'<div class="kb-head">packed: {len(panel):,} bytes hold the same columns of rows {first} '
        f"to {first + PANEL - 1}; one line is 64 bytes, one load of a vector register; row "
        f"{first + row} is bright</div>"
        f'<div class="kb-grid kb-panel">{"".join(lines)}</div></div>'
    )


def _cell(
    shown: Bytes, value: int, at: int, byte: Byte, row: int, first: int, *, blocks: bool = False
) -> str:
    where = row if blocks else (byte.holds[0].row if byte.holds else byte.row)
    mine = where == row or where < 0
    columns = [b.column for b in byte.holds]
    kinds = [f"kb-{byte.field}"]
    if byte.field in ("codes", "high") and columns:
        kinds = [f"g{columns[0] // GROUP}"]
        last = columns[-1] // GROUP
        if last != columns[0] // GROUP:
            kinds.append(f"h{last}")
        if byte.field == "high":
            kinds.append("kb-high")
    if mine:
        kinds += ["mine", *(f"w{c}" for c in columns)]
    says = f"byte {at} = 0x{value:02x}: {_says(shown, byte, where, first, mine)}"
    return f'<i class="{" ".join(kinds)}" data-t="{text(says)}">{f"{value:02x}" * blocks}</i>'


def _says(shown: Bytes, byte: Byte, row: int, first: int, mine: bool) -> str:
    if byte.holds:
        if not mine:
            return f"row {first + row}, columns {', '.join(str(b.column) for b in byte.holds)}"
        parts = []
        for b in byte.holds:
            bits = f"bits {b.shift}-{b.shift + b.count - 1}" if b.count > 1 else f"bit {b.shift}"
            code, weight = shown.codes_RC[row, b.column], shown.values_RC[row, b.column]
            parts.append(
                f"{bits}: column {b.column}"
                + (f" (upper bits of code {code})" if b.to else f", code {code}, {weight:+.4f}")
            )
        return f"row {first + row}, " + "; ".join(parts)
    if byte.field == "padding":
        return "padding"
    which = f", sub-block {byte.sub}" if byte.sub >= 0 and byte.field in ("scales", "mins") else ""
    return f"{NAMES[byte.field]}, row {first + row}{which}"


def _line_name(panel: list[Byte], start: int) -> str:
    byte = panel[start]
    if byte.field not in ("codes", "high"):
        ends = dict.fromkeys(b.field for b in panel[start : start + ALIGN])
        return ", ".join(ends)
    columns = [b.column for b in byte.holds]
    names = " | ".join(f"{c}-{c + 3}" for c in columns)
    return f"{'high ' * (byte.field == 'high')}col. {names}"
