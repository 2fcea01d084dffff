"""A Hugging Face folder as a checkpoint: config.json and safetensors, mapped, checked, not decoded.

Plain matrices are views of the files. Put together at first use are experts stored one by one, keys
out of `kv_b_proj` (their axes are swapped), and FP8 with its block scales (`weight_scale_inv`).
"""

import gc
import math
import re
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ktlab.checkpoint.checkpoint import CheckpointView, check_tensors, together, unknown_tensor
from ktlab.checkpoint.config import ModelConfig
from ktlab.checkpoint.gathered import GatheredTensor
from ktlab.checkpoint.hugging_face_config import config_from_json
from ktlab.checkpoint.hugging_face_names import Origin, origin
from ktlab.checkpoint.names import Shape, expected_tensors, is_quantizable
from ktlab.checkpoint.safetensors_file import DTYPE_BYTES, Kind, MappedFile, StoredTensor
from ktlab.checkpoint.safetensors_folder import CONFIG, read_folder, read_json_object
from ktlab.checkpoint.tokenizer import Tokenizer
from ktlab.errors import CheckpointError, short
from ktlab.kernels.packing import drop_pages
from ktlab.quantization import Format, QTensor, get_format
from ktlab.quantization.float8 import E4M3, GROUP, join_scales

Bytes = NDArray[np.uint8]

FP8, SCALE = "F8_E4M3", "_scale_inv"
FORMAT_OF = {"F32": "f32", "F16": "f16", "BF16": "bf16", FP8: "fp8_e4m3"}
"""{type of a safetensors file: format here}; other types hold no weights that this kit computes."""
_NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$")
_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")


class SafetensorsCheckpoint(CheckpointView):
    """A folder with config.json and *.safetensors, one or many, of a family that we have.

    Norms, biases and the router's gate are f32, as in a GGUF. Raises `CheckpointError` with
    everything that is wrong with the folder; nothing but headers has been read then.
    """

    def __init__(self, path: str | Path, *, name: str | None = None) -> None:
        self.folder = self.path = Path(path)
        self.name = name or self.folder.resolve().name
        with _no_collection():
            self._open(self.folder)

    def _open(self, folder: Path) -> None:
        content = read_json_object(folder / CONFIG)
        self.metadata: Mapping[str, object] = content
        where = f"{folder.name}/{CONFIG}"
        config = config_from_json(where, self.name, content)
        self._scale_block = _scale_block(where, content)
        self._scale_shapes: dict[Shape, Shape] = {}
        self._stored = read_folder(folder)
        self._check_counts(where, config)
        self._shapes = expected_tensors(config)
        self._origins = {
            name: origin(config, name, shape, self._stored) for name, shape in self._shapes.items()
        }
        further = {layer for layer in map(_layer, self.unused) if layer is not None}
        further = {layer for layer in further if layer >= config.num_layers}
        self.config: ModelConfig = replace(config, num_nextn_layers=len(further))
        self._check()
        self.files = self._stored.paths
        self._files = {path: MappedFile(path) for path in self.files}
        self._kept: weakref.WeakValueDictionary[str, QTensor] = weakref.WeakValueDictionary()

    # What must be there ----------------------------------------------------------------------

    def _check_counts(self, where: str, config: ModelConfig) -> None:
        """Refuse counts far beyond the files' tensors before that many names are made."""
        counts = {"num_hidden_layers": config.num_layers}
        # Stored one by one, experts have three matrices each.
        if any(".experts.0." in name for name in self._stored.kinds):
            counts["layers with experts, experts and 3"] = (
                3 * len(config.moe_layers) * config.num_experts
            )
        for what, count in counts.items():
            if count > 2 * len(self._stored) + 1000:
                raise CheckpointError(
                    f"{where}: {what} make {count}, but the files hold only {len(self._stored)} "
                    "tensors; one of the two belongs to another model"
                )

    def _check(self) -> None:
        """Names, shapes, types, scales; and nothing left over that would silently be ignored."""
        shapes = expected_tensors(self.config)
        problems: list[str] = []
        present: dict[str, Shape] = {}
        for name, made_of in self._origins.items():
            found = list(self._faults(made_of))
            problems += found
            present[name] = shapes[name]  # faults are told in the file's own names
        for name in self.unused:
            layer = _layer(name)
            ours = layer is None or layer < self.config.num_layers
            tied = self.config.tied_output and name == "lm_head.weight"
            if ours and not tied and not _NOT_WEIGHTS.search(name):
                problems.append(f"{name} has no place in a model of this kind")
        check_tensors(self.name, self.config, present, problems)

    def _faults(self, made_of: Origin) -> Iterator[str]:
        if self._regular(made_of):
            return
        missing = [name for name in made_of.names if name not in self._stored]
        if missing:
            more = f" and {len(missing) - 1} more experts" if len(missing) > 1 else ""
            verb = "are" if more else "is"
            yield f"{missing[0]}{more} {verb} missing (expected shape {made_of.shape})"
        entries = [self._stored[name] for name in made_of.names if name in self._stored]
        for entry in entries:
            if entry.dtype not in FORMAT_OF:
                known = ", ".join(FORMAT_OF)
                yield f"{entry.name} is of type {entry.dtype}, expected one of {known}"
            elif entry.shape != made_of.shape:
                yield f"{entry.name} has shape {entry.shape}, expected {made_of.shape}"
            elif entry.dtype == FP8:
                yield from self._scale_faults(entry)
        types = {entry.dtype for entry in entries}
        if len(types) > 1:
            names = " and ".join(sorted(types))
            yield f"{entries[0].name} and the other experts of its layer are {names}, expected one"

    def _regular(self, made_of: Origin) -> bool:
        """Whether nothing is wrong with these tensors, found without looking at each by itself."""
        kind_of = self._stored.kinds.__getitem__
        try:
            kinds = list(map(kind_of, made_of.names))
            if not _alike(kinds) or (kind := kinds[0]).shape != made_of.shape:
                return False
            if kind.dtype != FP8 or len(kind.shape) < 2:
                return kind.dtype in FORMAT_OF and kind.dtype != FP8
            scales = list(map(kind_of, [name + SCALE for name in made_of.names]))
        except KeyError:
            return False
        expected = ("F32", self._scale_shape(kind.shape))
        return _alike(scales) and (scales[0].dtype, scales[0].shape) == expected

    def _scale_faults(self, entry: StoredTensor) -> Iterator[str]:
        if len(entry.shape) < 2:
            yield f"{entry.name} is {FP8} and no matrix, which has no block scales"
            return
        expected = self._scale_shape(entry.shape)
        scale = self._stored.get(entry.name + SCALE)
        if scale is None:
            yield f"{entry.name}{SCALE} is missing, the block scales of an {FP8} tensor"
        elif scale.dtype != "F32" or scale.shape != expected:
            yield f"{scale.name} is {scale.dtype} {scale.shape}, expected F32 {expected}"

    def _scale_shape(self, shape: Shape) -> Shape:
        known = self._scale_shapes.get(shape)
        if known is None:
            (rows, cols), (per_rows, per_cols) = shape[-2:], self._scale_block
            known = (*shape[:-2], -(-rows // per_rows), -(-cols // per_cols))
            self._scale_shapes[shape] = known
        return known

    @cached_property
    def unused(self) -> list[str]:
        """Tensors in the files that the model does not use, e.g. next-token-prediction layers."""
        left = dict(self._stored.kinds)
        for made_of in self._origins.values():  # no loop over names: there are 90 thousand
            for names in (made_of.names, [name + SCALE for name in made_of.names]):
                deque(map(left.pop, names, repeat(None)), maxlen=0)
        return list(left)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """From tokenizer.json, a token for every row of the embedding; None where there is none."""
        file = self.folder / "tokenizer.json"
        if not file.exists():
            return None
        tokenizer = Tokenizer.from_file(file)
        if tokenizer.vocab_size > self.config.vocab_size:
            raise CheckpointError(
                f"{file}: the tokenizer has {tokenizer.vocab_size} tokens, "
                f"the embedding only {self.config.vocab_size} rows"
            )
        return tokenizer.padded(self.config.vocab_size)

    # Tensors ---------------------------------------------------------------------------------

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if a file that is in use was written to since it was opened."""
        for file in self._files.values():
            file.check_unchanged()

    def names(self) -> list[str]:
        """Canonical names of all tensors."""
        return list(self._origins)

    def listing(self) -> list[tuple[str, str, Shape, int]]:
        """(name, format, shape, bytes) of each tensor in the files, under the files' names."""
        return [
            (e.name, FORMAT_OF.get(e.dtype, e.dtype.lower()), e.shape, e.nbytes)
            for e in self._stored.values()
        ]

    def described(self) -> list[tuple[str, str, Shape, int]]:
        """(canonical name, format, shape, bytes) of each, as `tensor` gives it; no weights."""
        found = []
        for name, shape in self._shapes.items():
            made_of = self._origins[name]
            format = self._format(self._stored.kinds[made_of.names[0]], made_of)
            if not is_quantizable(name, shape):
                format = get_format("f32")
            nbytes = math.prod(shape[:-1]) * format.row_bytes(shape[-1])
            found.append((name, format.name, shape, nbytes))
        return found

    def tensor(self, name: str) -> QTensor:
        """The tensor of that canonical name: a view of a file, or gathered when it is used."""
        if name not in self._origins:
            raise unknown_tensor(self.name, name, self._origins)
        kept = self._kept.get(name)
        if kept is None:
            kept = self._kept[name] = self._make(name)
        return kept

    def _make(self, name: str) -> QTensor:
        made_of, shape = self._origins[name], self._shapes[name]
        entries = [self._stored[stored] for stored in made_of.names]
        format = self._format(entries[0], made_of)
        files = list(dict.fromkeys(entry.path.name for entry in entries))
        about = _About(name, format, shape, files[0] + (", ..." if len(files) > 1 else ""))
        tensor = self._view(entries, made_of, about) or GatheredTensor(
            name=name,
            format=format,
            shape=shape,
            make=lambda index: self._matrix(entries, made_of, format, index),
            # Experts are read one by one, however they are stored; so heads are not.
            count=shape[0] if len(entries) > 1 or len(made_of.shape) == 3 else 1,
            source=about.source,
        )
        return tensor if is_quantizable(name, shape) else tensor.requantize("f32")

    def _format(self, entry: Kind | StoredTensor, made_of: Origin) -> Format:
        """FP8 keeps its bytes where rows divide into groups with one scale each; else f32."""
        whole = entry.shape[-1] % GROUP == 0 and self._scale_block[1] == GROUP
        if entry.dtype == FP8 and (made_of.transposed or not whole):
            return get_format("f32")
        return get_format(FORMAT_OF[entry.dtype])

    def _view(
        self, entries: list[StoredTensor], made_of: Origin, about: "_About"
    ) -> QTensor | None:
        """The tensor as a view of one file, where its bytes lie there as they must."""
        first = entries[0]
        aligned = first.offset % DTYPE_BYTES[first.dtype] == 0
        if len(entries) > 1 or made_of.transposed or first.dtype == FP8 or not aligned:
            return None
        rows = _taken(self._raw(first), made_of)
        return QTensor(
            name=about.name,
            format=about.format,
            shape=about.shape,
            blocks=rows,
            source=about.source,
        )

    def _raw(self, entry: StoredTensor) -> Bytes:
        """The stored bytes, row by row."""
        data = self._files[entry.path].bytes_of(entry)
        return data.reshape(*entry.shape[:-1], entry.shape[-1] * DTYPE_BYTES[entry.dtype])

    def _matrix(
        self, entries: list[StoredTensor], made_of: Origin, format: Format, index: int
    ) -> Bytes:
        """Rows of one expert (or of the whole, where there are none), in `format`."""
        entry = entries[index if len(entries) > 1 else 0]
        stored = self._raw(entry)
        stored_NK = stored[index] if stored.ndim == 3 else stored
        rows = stored_NK
        if entry.dtype == FP8:
            scale = self._stored[entry.name + SCALE]
            scales = self._raw(scale).copy().view(np.float32)
            rows = self._scaled(stored_NK, scales[index] if scales.ndim == 3 else scales, format)
        rows = _taken(rows, made_of)
        if made_of.transposed:
            elements_HNC = rows.view(f"u{format.block_bytes}")
            rows = np.ascontiguousarray(elements_HNC.transpose(0, 2, 1)).view(np.uint8)
        if not np.shares_memory(rows, stored_NK):
            drop_pages(stored_NK)
        return rows.reshape(-1, rows.shape[-1])

    def _scaled(self, codes_NK: Bytes, scales: NDArray[np.float32], format: Format) -> Bytes:
        """FP8 codes with their block scales, as rows of `format` (fp8_e4m3 or f32)."""
        (rows, cols), (per_rows, per_cols) = codes_NK.shape, self._scale_block
        scale_NG = np.repeat(scales, per_rows, axis=0)[:rows]
        if format.name != "f32":
            return join_scales(codes_NK, scale_NG)
        values_NK = E4M3[codes_NK] * np.repeat(scale_NG, per_cols, axis=1)[:, :cols]
        return values_NK.view(np.uint8)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's collector stands still: where 90 thousand objects are made to stay, it looks at all
    that the process has several times, which takes longer than making them."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class _About(NamedTuple):
    """What a tensor is, apart from its bytes."""

    name: str
    format: Format
    shape: Shape
    source: str


def _taken(rows: Bytes, made_of: Origin) -> Bytes:
    """Those of the stored rows that belong to the tensor: half of gate_up, keys or values."""
    if made_of.heads:
        rows = rows.reshape(made_of.heads, -1, rows.shape[-1])
    return rows if rows.ndim < 2 else rows[..., slice(*made_of.rows), :]


def _alike(kinds: list[Kind]) -> bool:
    """Whether all are of one type and shape; quick, because those of a file are one object."""
    return kinds.count(kinds[0]) == len(kinds)


def _layer(name: str) -> int | None:
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def _scale_block(where: str, content: Mapping[str, object]) -> tuple[int, int]:
    """Rows and columns of an FP8 scale; refuses weights that are quantized in any other way."""
    quantization = content.get("quantization_config")
    if quantization is None:
        return GROUP, GROUP
    given = quantization if isinstance(quantization, Mapping) else {}
    method, block = given.get("quant_method"), given.get("weight_block_size", [GROUP, GROUP])
    sizes = block if isinstance(block, list) else []
    problems = []
    if method != "fp8":
        problems.append(f"quantization_config.quant_method is {short(method)}, expected 'fp8'")
    if len(sizes) != 2 or not all(type(n) is int and 0 < n < 1 << 20 for n in sizes):
        problems.append(
            f"quantization_config.weight_block_size is {short(block)}, "
            "expected the rows and columns that share a scale, e.g. [128, 128]"
        )
    if problems:
        advice = "take the checkpoint in BF16 or FP8, or a GGUF of it"
        raise CheckpointError(together(where, problems, advice))
    return sizes[0], sizes[1]
