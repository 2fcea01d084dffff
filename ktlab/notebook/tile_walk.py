"""How a tile product walks packed weights: real codes and activations, one step at a time.

As the kernels do it (ktlab_ext/csrc/amx.inc.h, kernel.inc.h): A is 16 tokens of int8 activations, B
16 rows of weights' codes as they lie packed, C 16 x 16 sums in int32. Where a scale holds for 32
columns only, the sums are scaled and put away after 32 columns, so that a tile is half full.

T tokens (16), R rows (16), K columns of a chunk (256).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ktlab import figures
from ktlab.errors import SettingError
from ktlab.kernels.codings import CHUNK, CODINGS, GROUP, PANEL, TABLE
from ktlab.quantization import QTensor

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

TOKENS = 16
TILE_K = 64
"""Columns of a full tile: 16 lines of 4."""
INSTRUCTIONS = ("TDPBSUD", "VPDPBUSD")
FORMATS = ("int8_channel", "q4_k", "q8_0", "q4_0", "q6_k")


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where a walk is: code vector `line` (4 columns of 16 rows) times token `token` (-1: all)."""

    index: int
    line: int
    """0..63: columns 4 line to 4 line + 3."""
    token: int
    start: int
    """First column since the sums were last put away."""
    tile: int
    """First column of the tile on view."""
    width: int
    """Columns of a tile: 64, or what one scale covers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Walk:
    """16 tokens times 16 rows over 256 columns, in integers and in float64."""

    instruction: str
    format: str
    codes_RK: NDArray[np.int64]
    zero: int
    scale_RS: NDArray[np.float64]
    """Of each sub-block; value = scale * (code - zero) - minimum."""
    min_RS: NDArray[np.float64]
    sub: int
    x_TK: NDArray[np.float64]
    q_TK: NDArray[np.int64]
    """Activations as int8."""
    x_scale_TG: NDArray[np.float64]
    """Their scales: one for each 32 columns or more."""

    @classmethod
    def of(cls, tensor: QTensor, x_TK: NDArray[np.floating], instruction: str) -> "Walk":
        """The first 16 rows and 256 columns of `tensor` (N, K), 16 activations of 256 columns."""
        if instruction not in INSTRUCTIONS:
            raise SettingError(f"{instruction!r}: expected one of {', '.join(INSTRUCTIONS)}")
        format = tensor.format.name
        if format not in FORMATS:
            raise SettingError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
        coding = CODINGS[format]
        sub = CHUNK if coding.scales == "row" else min(coding.sub, CHUNK)
        values_RK = tensor[:PANEL].dequantize()[:, :CHUNK].astype(np.float64)
        codes_RK = codes_of(tensor[:PANEL])
        zero = coding.packed_zero
        scale_RS, min_RS = affine(values_RK, codes_RK - zero, sub)
        x = np.asarray(x_TK, np.float64)[:TOKENS, :CHUNK]
        x_scale_TG, q_TK = quantized(x, max(sub, GROUP))
        return cls(
            instruction=instruction, format=format, codes_RK=codes_RK, zero=zero,
            scale_RS=scale_RS, min_RS=min_RS, sub=sub, x_TK=x, q_TK=q_TK, x_scale_TG=x_scale_TG,
        )  # fmt: skip

    @property
    def steps(self) -> int:
        """AMX computes a line for all tokens at once; AVX-512 one token at a time."""
        return CHUNK // 4 * (1 if self.instruction == "TDPBSUD" else TOKENS)

    def at(self, index: int) -> Step:
        """Step `index`, 0 to steps - 1."""
        if not 0 <= index < self.steps:
            raise SettingError(f"step {index}: expected 0 to {self.steps - 1}")
        line, token = (index, -1) if self.instruction == "TDPBSUD" else divmod(index, TOKENS)
        column, width = 4 * line, min(TILE_K, self.sub)
        return Step(
            index=index, line=line, token=token, start=column // self.sub * self.sub,
            tile=column // width * width, width=width,
        )  # fmt: skip

    def sums(self, step: Step) -> NDArray[np.int64]:
        """C (T, R) in int32 after this step: products since the sums were last put away."""
        line = slice(4 * step.line, 4 * step.line + 4)
        before = slice(step.start, 4 * step.line)
        done = self.q_TK[:, before] @ (self.codes_RK - self.zero)[:, before].T
        now = self.q_TK[:, line] @ (self.codes_RK - self.zero)[:, line].T
        if step.token >= 0:
            now[step.token + 1 :] = 0
        return np.asarray(done + now)

    def scaled(self, columns: int) -> NDArray[np.float64]:
        """Result (T, R) of the first `columns`, sums times both scales, minima taken off."""
        total = np.zeros((TOKENS, PANEL))
        group = self.q_TK.shape[1] // self.x_scale_TG.shape[1]
        for s in range(columns // self.sub):
            part = slice(s * self.sub, (s + 1) * self.sub)
            x_scale_T1 = self.x_scale_TG[:, s * self.sub // group, None]
            dot = self.q_TK[:, part] @ (self.codes_RK - self.zero)[:, part].T
            total += x_scale_T1 * dot * self.scale_RS[:, s]
            sums_T1 = x_scale_T1 * self.q_TK[:, part].sum(1, keepdims=True)
            total -= sums_T1 * self.min_RS[:, s]
        return total

    @cached_property
    def exact(self) -> NDArray[np.float64]:
        """The float64 product with the dequantized weights, (T, R)."""
        spread = np.repeat(self.scale_RS, self.sub, 1), np.repeat(self.min_RS, self.sub, 1)
        values_RK = spread[0] * (self.codes_RK - self.zero) - spread[1]
        return np.asarray(self.x_TK @ values_RK.T)

    @property
    def error(self) -> float:
        """Norm of what rounding the activations to int8 costs, over that of the result."""
        return float(np.linalg.norm(self.scaled(CHUNK) - self.exact) / np.linalg.norm(self.exact))

    def figure(self, index: int) -> "Figure":
        """A, B and C at one step."""
        from plotly.subplots import make_subplots

        step = self.at(index)
        lines, tile = step.width // 4, slice(step.tile, step.tile + step.width)
        a_TK = np.full((TOKENS, TILE_K), np.nan)
        a_TK[:, : step.width] = self.q_TK[:, tile]
        b_LB = np.full((TILE_K // 4, 4 * PANEL), np.nan)
        b_LB[:lines] = (
            self.codes_RK[:, tile].reshape(PANEL, lines, 4).swapaxes(0, 1).reshape(lines, -1)
        )
        base = figures.figure(height=330)
        fig = make_subplots(
            1, 3, column_widths=[0.4, 0.4, 0.2], horizontal_spacing=0.085,
            subplot_titles=(
                "A: activations",
                "B: codes as packed",
                "C: sums",
            ),
        )  # fmt: skip
        fig.update_layout({**base.layout.to_plotly_json(), "xaxis": {}, "yaxis": {}})
        hovers = (
            f"token %{{y}}, column {step.tile} + %{{x}}: %{{z}}",
            "line %{y}, byte %{x}: code %{z}",
            "token %{y}, row %{x}: %{z}",
        )
        scales = (figures.DIVERGING, figures.SEQUENTIAL, figures.DIVERGING)
        tables: tuple[NDArray[np.generic], ...] = (a_TK, b_LB, self.sums(step))
        for i, (z, hover, colors) in enumerate(zip(tables, hovers, scales, strict=True), 1):
            limits = {"zmid": 0} if i != 2 else {"zmin": 0, "zmax": int(self.codes_RK.max())}
            fig.add_heatmap(
                z=z, colorscale=colors, showscale=False, xgap=1, ygap=1, hoverongaps=False,
                hovertemplate=hover + "<extra></extra>", row=1, col=i, **limits,
            )  # fmt: skip
        line = step.line - step.tile // 4
        rows = (-0.5, TOKENS - 0.5) if step.token < 0 else (step.token - 0.5, step.token + 0.5)
        boxes = (
            (1, 4 * line - 0.5, 4 * line + 3.5, *rows),
            (2, -0.5, 4 * PANEL - 0.5, line - 0.5, line + 0.5),
            (3, -0.5, PANEL - 0.5, *rows),
        )
        for column, x0, x1, y0, y1 in boxes:
            fig.add_shape(
                type="rect", x0=x0, x1=x1, y0=y0, y1=y1, row=1, col=column,
                line={"color": figures.VERMILION, "width": 3},
            )  # fmt: skip
        names = (("byte", "token"), ("byte: row 4·r+j", "line: 4 columns"), ("row", "token"))
        for i, (x, y) in enumerate(names, 1):
            style = {"showgrid": False, "zeroline": False, "color": figures.INK}
            fig.update_xaxes(title_text=x, title_standoff=4, row=1, col=i, **style)
            fig.update_yaxes(
                title_text=y, title_standoff=2, autorange="reversed", row=1, col=i, **style
            )
        return fig.update_layout(margin={"l": 44, "r": 8, "t": 44, "b": 40}, showlegend=False)

    def says(self, index: int) -> str:
        """The step in words and numbers, as text."""
        step = self.at(index)
        columns = f"columns {4 * step.line} to {4 * step.line + 3}"
        tile, lines = step.tile // step.width + 1, step.width // 4
        if step.token < 0:
            what = (
                f"TDPBSUD {tile} of {CHUNK // step.width}, line {step.line % lines + 1} of "
                f"{lines}: "
                f"{columns} of 16 tokens × 16 rows, 1,024 products"
            )
        else:
            what = (
                f"VPDPBUSD {step.index + 1} of {self.steps}: code vector {step.line} times "
                f"4 bytes of token {step.token}, {columns} of 16 rows, 64 products"
            )
        last = 4 * step.line + 4 == step.start + self.sub and step.token in (-1, TOKENS - 1)
        after = (
            f"; then the sums are scaled and put away: one scale covers {self.sub} columns"
            if last
            else ""
        )
        return what + after


def codes_of(tensor: QTensor) -> NDArray[np.int64]:
    """Codes (R, K) as packed (unsigned); table formats are refused."""
    from ktlab.kernels.block_parts import read_blocks

    coding = CODINGS[tensor.format.name]
    if coding.table:
        raise SettingError(f"{tensor.format.name} codes are indices of {len(TABLE)} levels")
    parts = read_blocks(coding, tensor.blocks, tensor.shape[-1])
    return parts.codes_RC[:, :CHUNK].astype(np.int64)


def affine(
    values_RK: NDArray[np.float64], codes_RK: NDArray[np.int64], sub: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scale and minimum of each sub-block, solved from values and codes: v = scale * c - min."""
    shape = (len(values_RK), -1, sub)
    v, c = values_RK.reshape(shape), codes_RK.reshape(shape).astype(np.float64)
    mean_v, mean_c = v.mean(-1, keepdims=True), c.mean(-1, keepdims=True)
    spread = ((c - mean_c) ** 2).sum(-1)
    slope = ((v - mean_v) * (c - mean_c)).sum(-1)
    scale = np.divide(slope, spread, out=np.zeros_like(slope), where=spread > 0)
    return scale, scale * mean_c[..., 0] - mean_v[..., 0]


def quantized(
    x_TK: NDArray[np.float64], group: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Activations as int8, one scale for each `group` columns: (scales, integers)."""
    parts = x_TK.reshape(len(x_TK), -1, group)
    largest = np.abs(parts).max(-1)
    scale = np.where(largest > 0, largest / 127, 1.0)
    return scale, np.rint(parts / scale[..., None]).astype(np.int64).reshape(x_TK.shape)
