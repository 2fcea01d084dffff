"""Files of a known model's true shape and formats with synthetic weights, written as a stream.

A clock needs true sizes and formats, not true values. What the weights are: for each format and
number of inputs a pool of about a million normally distributed weights (variance 1 / inputs) is
quantized once by the format's own rule; a matrix is then blocks of that pool in random order, drawn
for each matrix and piece of it from a generator of its own. So every block is one that the format
really makes of such weights, rows differ, activations stay near 1 through all layers, and no more
than a piece is ever in memory. Two rows share a block in a place once in thousands of blocks.
Norms, biases and gates are drawn directly, as in `synthesis`.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from ktlab.checkpoint.config import ModelConfig
from ktlab.checkpoint.mixtures import mixture
from ktlab.checkpoint.names import expected_tensors
from ktlab.checkpoint.opening import open_checkpoint
from ktlab.checkpoint.part_file import Piece, Progress, write_in_pieces
from ktlab.checkpoint.synthesis import fan_in, random_values
from ktlab.checkpoint.tokenizer import Tokenizer, byte_tokenizer
from ktlab.checkpoint.writer import TensorSpec, gguf_header
from ktlab.errors import CheckpointError
from ktlab.kernels import packing
from ktlab.quantization import Format, QTensor

POOL_WEIGHTS = 1 << 20
PIECE_BYTES = 16 << 20
RECIPE = 1
"""Goes up when the same arguments give other bytes: an older FILE.part is then not gone on with."""


def synthesize_file(
    path: str | Path,
    config: ModelConfig,
    format: str,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write a GGUF for `config` with the formats that llama.cpp's file type `format` gives.

    `format` is a file type such as "q4_k_m" or one format for all matrices, such as "q8_0". The
    vocabulary is the embedded model's, filled up with unused tokens. A run that was killed goes on
    where it was and ends with the same bytes. `progress` is called with (bytes done, bytes in all).
    Raises `CheckpointError` as `write_in_pieces` does.
    """
    path = Path(path).expanduser()
    shapes = expected_tensors(config)
    formats = mixture(format, shapes, config)
    specs = [TensorSpec(name=n, format=formats[n], shape=shape) for n, shape in shapes.items()]
    note = f"synthetic weights, ktlab recipe {RECIPE}, seed {seed}"
    header = gguf_header(
        path.name, config, specs, _tokenizer(config), {"general.description": note}
    )
    pieces = list(_pieces(len(header), specs, seed))
    total = len(header) + sum(spec.padded_bytes for spec in specs)
    return write_in_pieces(path, header, pieces, total, progress)


def sliced(
    config: ModelConfig, *, layers: int | None = None, experts: int | None = None
) -> ModelConfig:
    """The same widths with fewer layers or routed experts a layer, named for it.

    As many leading layers stay dense as there were, or one where that would leave none with
    experts. Groups of experts stay if the experts divide into them and a token still reaches as
    many as it selects. `CheckpointError` where the numbers are impossible.
    """
    changes: dict[str, int] = {}
    problems = []
    name = config.name
    if layers is not None:
        if not 1 <= layers <= config.num_layers:
            problems.append(f"layers={layers}, expected 1 to {config.num_layers}")
        dense = config.first_dense_layers
        changes |= {"num_layers": layers, "first_dense_layers": dense if layers > dense else 1}
        name += f", {layers} layers"
    if experts is not None:
        if not config.top_k <= experts <= config.num_experts:
            problems.append(f"experts={experts}, expected {config.top_k} to {config.num_experts}")
        changes |= {"num_experts": experts}
        reached = experts // config.n_group * config.topk_group
        if experts % config.n_group or reached < config.top_k:
            changes |= {"n_group": 1, "topk_group": 1}
        name += f", {experts} experts"
    if problems:
        raise CheckpointError(f"{config.name}: " + "; ".join(problems))
    return replace(config, name=name, **changes)  # type: ignore[arg-type]


def _tokenizer(config: ModelConfig) -> Tokenizer | None:
    embedded = open_checkpoint("tiny").tokenizer
    if embedded is not None and embedded.vocab_size <= config.vocab_size:
        return embedded
    return byte_tokenizer(config.vocab_size) if config.vocab_size >= 258 else None


def _pieces(start: int, specs: list[TensorSpec], seed: int) -> Iterator[Piece]:
    for spec in specs:
        rows = max(1, PIECE_BYTES // spec.row_bytes)
        for first in range(0, spec.rows, rows):
            count = min(rows, spec.rows - first)
            yield Piece(
                offset=start + first * spec.row_bytes,
                nbytes=count * spec.row_bytes,
                make=partial(_rows, spec, count, (seed, crc32(spec.name.encode()), first)),
            )
        start += spec.padded_bytes


def _rows(spec: TensorSpec, count: int, seed: tuple[int, ...]) -> NDArray[np.uint8]:
    """(count * row bytes,): `count` rows of a tensor, always the same for a seed."""
    generator = np.random.default_rng(seed)
    inputs = fan_in(spec.name, spec.shape)
    if spec.format.block_size == 1:
        values = random_values(generator, spec.name, (count, spec.shape[-1]), inputs)
        return spec.format.quantize(values).reshape(-1)
    pool = _pool(spec.format, inputs)
    places = generator.integers(
        len(pool), size=count * (spec.shape[-1] // spec.format.block_size), dtype=np.uint16
    )
    return pool.take(places).view(np.uint8)


@lru_cache(maxsize=64)
def _pool(format: Format, inputs: int) -> NDArray[np.void]:
    """(blocks,) blocks of weights with variance 1 / inputs; the same in every run."""
    size = format.block_size
    generator = np.random.default_rng((size, inputs))
    values = generator.standard_normal((POOL_WEIGHTS // size, size), np.float32)
    pool = QTensor.from_array("pool", values / np.float32(np.sqrt(inputs)))
    blocks = packing.convert(pool, format).blocks
    return np.ascontiguousarray(blocks).view(f"V{format.block_bytes}").reshape(-1)
