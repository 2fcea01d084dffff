"""One layer of routed experts with a real model's widths and synthetic weights, made in seconds.

A clock needs true sizes, not true values: each matrix is drawn from a codebook of normally
distributed rows, quantized once, in an order of its own for each expert. All experts differ in
memory, and the exact output still costs little, for a row's product with the input is that of its
codebook row.

T tokens, D hidden, E experts, K selected, F width, N rows, R codebook rows, V routings.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktlab.checkpoint.published import published_models
from ktlab.errors import SettingError, nearest
from ktlab.quantization.formats import FORMATS, Format, fallback_format, get_format
from ktlab.quantization.qtensor import QTensor
from ktlab.record import Record

MATRICES = ("gate", "up", "down")
CODEBOOK_ROWS = 256
ROUTINGS = 8
"""At most so many different routings are taken in turn."""
MIXES = {"q4_k_m": ("q4_k", "q4_k", "q6_k"), "q5_k_m": ("q5_k", "q5_k", "q6_k")}
"""What llama.cpp's mixed file types give gate, up and down (in half of the layers)."""


@dataclass(frozen=True, kw_only=True)
class MoeShape(Record):
    """Widths of one MoE layer."""

    name: str
    hidden: int
    width: int
    """Of one expert."""
    experts: int
    top_k: int
    source: str = ""

    @property
    def expert_weights(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.hidden * self.width


@lru_cache(maxsize=1)
def shapes() -> dict[str, MoeShape]:
    """The known models' shapes by name, from data/models; of two names for one, the first."""
    found: dict[str, MoeShape] = {}
    for name, model in published_models().items():
        config = model.config
        shape = MoeShape(
            name=name,
            hidden=config.hidden_size,
            width=config.expert_size,
            experts=config.num_experts,
            top_k=config.top_k,
            source=model.source,
        )
        if shape.source not in {known.source for known in found.values()}:
            found[name] = shape
    return found


def get_shape(name: str, experts: int | None = None) -> MoeShape:
    """A known model's shape, or "HIDDENxWIDTHxEXPERTSxTOP_K"; `experts` keeps fewer in memory."""
    known = shapes()
    numbers = name.split("x")
    if name in known:
        shape = known[name]
    elif len(numbers) == 4 and all(n.isdecimal() and int(n) > 0 for n in numbers):
        hidden, width, total, top_k = map(int, numbers)
        if top_k > total:
            raise SettingError(
                f"shape {name!r}: expected no more selected experts than there are, found {top_k} "
                f"of {total}"
            )
        shape = MoeShape(name=name, hidden=hidden, width=width, experts=total, top_k=top_k)
    else:
        raise SettingError(
            f"unknown shape {name!r}{nearest(name, known)}; known: {', '.join(known)}, or four "
            "numbers such as 2048x1408x64x6 (hidden, expert width, experts, top_k)"
        )
    present = shape.experts if experts is None else experts
    if not shape.top_k <= present <= shape.experts:
        raise SettingError(
            f"experts={present}: {shape.name} selects {shape.top_k} of {shape.experts} experts, "
            f"so expected {shape.top_k} to {shape.experts}"
        )
    return MoeShape(**{**shape.to_dict(), "experts": present})


def formats_of(name: str, shape: MoeShape) -> tuple[str, str, str]:
    """Formats of gate, up and down: a mix such as "q4_k_m", or one format; where rows do not
    divide into its blocks, what llama.cpp takes instead."""
    if name not in MIXES and name not in FORMATS:
        known = [*MIXES, *FORMATS]
        raise SettingError(
            f"unknown format {name!r}{nearest(name, known)}; usable: {', '.join(known)}"
        )
    wanted = MIXES.get(name, (name,) * 3)
    rows = (shape.hidden, shape.hidden, shape.width)
    gate, up, down = (fallback_format(f, n).name for f, n in zip(wanted, rows, strict=True))
    return gate, up, down


def fallbacks(name: str, formats: tuple[str, str, str]) -> str:
    """In words, what `formats_of` gave instead of the format `name`; "" where it gave what it is.

    formats: of gate, up and down."""
    wanted = MIXES.get(name, (name,) * 3)
    return "; ".join(
        f"{matrix} is {found}: its rows do not divide into blocks of {format}"
        for matrix, found, format in zip(MATRICES, formats, wanted, strict=True)
        if found != format
    )


def check_seed(seed: int) -> None:
    """`SettingError` for what NumPy's generators do not start from."""
    if seed < 0:
        raise SettingError(f"seed={seed}: expected 0 or more")


def expert_bytes(shape: MoeShape, formats: tuple[str, str, str]) -> int:
    """Bytes of one expert in the file's layout."""
    sizes = ((shape.width, shape.hidden), (shape.width, shape.hidden), (shape.hidden, shape.width))
    return sum(
        rows * get_format(format).row_bytes(columns)
        for format, (rows, columns) in zip(formats, sizes, strict=True)
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Matrices:
    """E matrices of N rows taken from R codebook rows."""

    format: Format
    codebook: NDArray[np.uint8]
    """(R, row bytes)"""
    values_RK: NDArray[np.float32]
    """The codebook's exact values."""
    rows_EN: NDArray[np.intp]

    @classmethod
    def draw(
        cls, format: Format, shape: tuple[int, int, int], generator: np.random.Generator
    ) -> "Matrices":
        """Normal values of the variance that keeps the output's size that of the input."""
        experts, rows, columns = shape
        size = min(rows, CODEBOOK_ROWS)
        values_RK = generator.standard_normal((size, columns), np.float32) / np.sqrt(columns)
        codebook = format.quantize(values_RK.astype(np.float32))
        return cls(
            format=format,
            codebook=codebook,
            values_RK=format.dequantize(codebook),
            rows_EN=generator.integers(size, size=(experts, rows)),
        )

    def stacked(self, name: str) -> QTensor:
        """The whole tensor (E, N, K); this is what takes memory."""
        shape = (*self.rows_EN.shape, self.values_RK.shape[1])
        return QTensor(
            name=name,
            format=self.format,
            shape=shape,
            blocks=self.codebook[self.rows_EN],
            source="synthetic",
        )


class SyntheticExperts:
    """The weights, inputs and exact outputs of one benchmark; the same for the same seed."""

    def __init__(self, shape: MoeShape, formats: tuple[str, str, str], seed: int) -> None:
        self.shape, self.formats, self.seed = shape, formats, seed
        generator = np.random.default_rng(seed)
        sizes = {
            "gate": (shape.experts, shape.width, shape.hidden),
            "up": (shape.experts, shape.width, shape.hidden),
            "down": (shape.experts, shape.hidden, shape.width),
        }
        self.matrices = {
            name: Matrices.draw(get_format(format), sizes[name], generator)
            for name, format in zip(MATRICES, formats, strict=True)
        }
        self.weights = {name: matrix.stacked(name) for name, matrix in self.matrices.items()}

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in the file's layout."""
        return expert_bytes(self.shape, self.formats)

    def inputs(self, tokens: int) -> "Inputs":
        """Activations and routings for calls of `tokens` tokens."""
        shape = self.shape
        generator = np.random.default_rng((self.seed, tokens))
        hidden_TD = generator.standard_normal((tokens, shape.hidden), np.float32)
        slots = tokens * shape.top_k
        routings = 1 if slots >= 4 * shape.experts else ROUTINGS
        if slots <= shape.experts:  # consecutive calls share no expert
            order = [generator.permutation(shape.experts) for _ in range(routings)]
            each = shape.experts // slots
            pieces = [part for o in order for part in np.split(o[: each * slots], each)]
            ids_VTK = np.stack(pieces[:routings]).reshape(routings, tokens, shape.top_k)
        else:
            order_VTE = generator.random((routings, tokens, shape.experts)).argsort(-1)
            ids_VTK = np.ascontiguousarray(order_VTE[..., : shape.top_k])
        weights_VTK = generator.random(ids_VTK.shape, np.float32) + np.float32(0.1)
        weights_VTK /= weights_VTK.sum(-1, keepdims=True)
        return Inputs(
            hidden_TD=hidden_TD, ids_VTK=ids_VTK.astype(np.int64), weights_VTK=weights_VTK
        )

    def exact(self, inputs: "Inputs", tokens: int) -> NDArray[np.float64]:
        """Output (tokens, D) of the first tokens of the first routing, in float64 throughout."""
        base = {name: m.values_RK.astype(np.float64) for name, m in self.matrices.items()}
        rows = {name: m.rows_EN for name, m in self.matrices.items()}
        x_TD = inputs.hidden_TD[:tokens].astype(np.float64)
        gate_TR, up_TR = x_TD @ base["gate"].T, x_TD @ base["up"].T
        output_TD = np.zeros(x_TD.shape)
        for token in range(tokens):
            for expert, weight in zip(
                inputs.ids_VTK[0, token], inputs.weights_VTK[0, token], strict=True
            ):
                gate_F = gate_TR[token, rows["gate"][expert]]
                up_F = up_TR[token, rows["up"][expert]]
                inner_F = gate_F / (1 + np.exp(-gate_F)) * up_F
                output_TD[token] += float(weight) * (base["down"] @ inner_F)[rows["down"][expert]]
        return output_TD

    def save(self, folder: Path, *, bfloat16: bool) -> None:
        """Write what the peers read (ktlab/measurement/peers/host.py): blocks, and where asked the
        same values as bfloat16 bits."""
        case: dict[str, Any] = {
            **self.shape.to_dict(),
            "formats": dict(zip(MATRICES, self.formats, strict=True)),
        }
        (folder / "case.json").write_text(json.dumps(case), encoding="utf-8")
        for name, weight in self.weights.items():
            np.save(folder / f"{name}.npy", weight.blocks)
            if bfloat16:
                matrix = self.matrices[name]
                bits = get_format("bf16").quantize(matrix.values_RK).view(np.uint16)
                np.save(folder / f"{name}_bf16.npy", bits[matrix.rows_EN])


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """What one call gets; calls take the V routings in turn."""

    hidden_TD: NDArray[np.float32]
    ids_VTK: NDArray[np.int64]
    weights_VTK: NDArray[np.float32]

    @property
    def touched(self) -> float:
        """Experts that a call reads, on average over the routings."""
        return float(np.mean([len(np.unique(ids_TK)) for ids_TK in self.ids_VTK]))

    def save(self, folder: Path) -> None:
        """As the peers read them."""
        tokens = len(self.hidden_TD)
        np.save(folder / f"hidden_{tokens}.npy", self.hidden_TD)
        np.save(folder / f"ids_{tokens}.npy", self.ids_VTK)
        np.save(folder / f"weights_{tokens}.npy", self.weights_VTK)
