"""What a model's header says: which tensors, in which formats, of how many bytes. No weights.

From a GGUF file or its shards, a folder of safetensors, or a published configuration and a file
type. Enough to plan where a model goes, in well under a second for 671 billion parameters.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from ktlab.checkpoint.config import ModelConfig
from ktlab.checkpoint.embedded import EMBEDDED_MODELS, data_path
from ktlab.checkpoint.gguf_config import read_config, unused_tensors
from ktlab.checkpoint.header import type_name
from ktlab.checkpoint.hugging_face import SafetensorsCheckpoint
from ktlab.checkpoint.mixtures import mixture
from ktlab.checkpoint.names import Shape, expected_tensors
from ktlab.checkpoint.published import published_model, published_models
from ktlab.checkpoint.safetensors_folder import safetensors_folder
from ktlab.checkpoint.shards import SHARD, no_file, read_headers, shard_paths
from ktlab.errors import CheckpointError, nearest
from ktlab.quantization import get_format


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """One tensor as it is stored, under its name in a GGUF."""

    name: str
    format: str
    shape: Shape
    nbytes: int

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model without its weights."""

    name: str
    config: ModelConfig
    tensors: tuple[TensorFacts, ...]
    source: str
    """Where this was read: files, or a published configuration and a file type."""
    files: tuple[Path, ...] = ()
    """Empty for a shape without files."""
    unused: tuple[TensorFacts, ...] = ()
    """Tensors in the files that the model has no use for; `tensors` is without them."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(tensor.size for tensor in self.tensors)


def read_facts(path_or_name: str | Path, *, format: str | None = None) -> ModelFacts:
    """The facts of "tiny", a .gguf file, a shard, a folder, or a published model with `format`.

    A name such as "deepseek-v3" is a shape without a file, unless there is a file of that name;
    `format` ("q4_k_m", "q8_0", "int8_channel", ...) says in which file type, default BF16 as
    published. With a file, `format` plans the model as if it were made anew in that format.
    Raises `CheckpointError` with everything that is wrong with the files.
    """
    name = str(path_or_name)
    path = Path(path_or_name).expanduser()
    if name in EMBEDDED_MODELS:
        facts = _from_gguf(data_path(EMBEDDED_MODELS[name]), name)
    elif (folder := safetensors_folder(path)) is not None:
        facts = _from_folder(SafetensorsCheckpoint(folder), path)
    elif path.exists():
        facts = _from_gguf(path, path.name)
    elif path.suffix or len(path.parts) > 1 or path.is_symlink():
        raise CheckpointError(no_file(path))
    else:
        return _from_shape(name, format or "bf16")
    return facts if format is None else _as_format(facts, format)


def model_files(path: Path) -> tuple[Path, ...]:
    """The files that hold the weights of the model at `path`: a file, its shards, or a folder's."""
    folder = safetensors_folder(path)
    return tuple(shard_paths(path) if folder is None else sorted(folder.glob("*.safetensors")))


def _from_gguf(path: Path, name: str) -> ModelFacts:
    headers = read_headers(shard_paths(path))
    where = headers[0].path.name
    entries = {entry.name: entry for header in headers for entry in header.entries}
    config = read_config(where, headers)
    unused = set(unused_tensors(config, entries))
    found = [
        TensorFacts(
            name=entry.name,
            format=type_name(entry.type_number).lower(),
            shape=entry.shape,
            nbytes=entry.nbytes,
        )
        for entry in entries.values()
    ]
    size = sum(header.size for header in headers)
    files = tuple(header.path for header in headers)
    shards = f" and {len(files) - 1} more shards" if len(files) > 1 else ""
    return ModelFacts(
        name=SHARD.sub(".gguf", name),
        config=config,
        tensors=tuple(tensor for tensor in found if tensor.name not in unused),
        source=f"{where}{shards}, {size:,} bytes",
        files=files,
        unused=tuple(tensor for tensor in found if tensor.name in unused),
    )


def _from_folder(checkpoint: SafetensorsCheckpoint, folder: Path) -> ModelFacts:
    tensors = tuple(
        TensorFacts(name=name, format=format, shape=shape, nbytes=nbytes)
        for name, format, shape, nbytes in checkpoint.described()
    )
    return ModelFacts(
        name=checkpoint.name,
        config=checkpoint.config,
        tensors=tensors,
        source=f"{folder.name}, headers of safetensors",
        files=model_files(folder),
    )


def _from_shape(name: str, format: str) -> ModelFacts:
    if name.lower() not in published_models():
        known = [*published_models(), *EMBEDDED_MODELS]
        raise CheckpointError(
            f"no file and no published model {name!r}{nearest(name, known)}; expected a .gguf "
            f"file, a folder, or one of: {', '.join(known)}"
        )
    model = published_model(name)
    return ModelFacts(
        name=model.name,
        config=model.config,
        tensors=_in_format(model.config, format),
        source=f"{model.source}, as {format}",
    )


def _as_format(facts: ModelFacts, format: str) -> ModelFacts:
    return ModelFacts(
        name=facts.name,
        config=facts.config,
        tensors=_in_format(facts.config, format),
        source=f"{facts.source}, made anew as {format}",
        files=facts.files,
    )


def _in_format(config: ModelConfig, format: str) -> tuple[TensorFacts, ...]:
    shapes = expected_tensors(config)
    formats = mixture(format, shapes, config)
    return tuple(
        TensorFacts(
            name=name,
            format=formats[name].name,
            shape=shape,
            nbytes=math.prod(shape[:-1]) * get_format(formats[name]).row_bytes(shape[-1]),
        )
        for name, shape in shapes.items()
    )
