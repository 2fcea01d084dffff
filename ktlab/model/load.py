"""`ktlab.load`: from a name or a file to a model."""

import os
import sys
import warnings
from collections.abc import Mapping
from os import PathLike, fspath

from ktlab.checkpoint.checkpoint import Checkpoint
from ktlab.checkpoint.converted import ConvertedCheckpoint, Progress, Quantization
from ktlab.checkpoint.opening import open_checkpoint
from ktlab.html import byte_size
from ktlab.kernels import codings, native, numba_backend
from ktlab.model.components import every_product
from ktlab.model.model import Model
from ktlab.model.residency import SlowFromDisk
from ktlab.progress import ProgressBar

MODEL_VARIABLE = "KTLAB_MODEL"


def load(
    path_or_name: "str | PathLike[str] | None" = None,
    *,
    convert: "Mapping[str, str] | None" = None,
    quantize: Quantization | None = None,
    progress: Progress | None = None,
) -> Model:
    """The embedded model ("tiny"), a GGUF file, or a folder of safetensors; memory-mapped.

    Without a path, what the environment variable KTLAB_MODEL names, or else "tiny": the notebooks
    load so, and work with another model unchanged.
    `quantize` turns matrices that are floats (f32, f16, bf16, FP8) into a format while loading:
    "int8_channel", or by name {"*_exps*": "int4_group128", "*": "q8_0"}. `convert` goes by the
    format in the file: {"iq1_m": "q8_0"} because no fast kernel computes iq1_m. Both work expert by
    expert: the model is never in memory twice. `progress` is called with (done, total) weights;
    without it a bar is drawn where stderr is a terminal or a notebook.
    Raises `CheckpointError` with everything that is wrong with the file; warns with `SlowFromDisk`
    where memory cannot hold the weights, with the tokens a second that the disk allows, and with
    `FloatCopies` where matrices have a format that no fast kernel computes.
    """
    if path_or_name is None:
        path_or_name = os.environ.get(MODEL_VARIABLE) or "tiny"
    checkpoint: Checkpoint = open_checkpoint(fspath(path_or_name))
    if not convert and not quantize:
        return _warned(Model(checkpoint))
    converted = ConvertedCheckpoint(checkpoint, convert, quantize=quantize)
    with converted.reporting(progress or ProgressBar(f"converting {converted.name}", sys.stderr)):
        return _warned(Model(converted))


class FloatCopies(UserWarning):
    """Matrices in a format that only torch computes, on a copy of 4 bytes a weight."""


def _warned(model: Model) -> Model:
    """Said before the first token: memory cannot hold this model, or copies will fill it."""
    disk = model.residency().disk
    if disk is not None:
        warnings.warn(f"{model.name} {disk}", SlowFromDisk, stacklevel=3)
    if copies := _float_copies(model):
        warnings.warn(f"{model.name}: {copies}", FloatCopies, stacklevel=3)
    return model


def _float_copies(model: Model) -> str:
    """Which formats are computed on float32 copies, for how many bytes, and the way out; "" where
    none is, or where nothing else could compute any."""
    if native.unavailable() and numba_backend.unavailable():
        return ""
    computed = {*codings.FORMATS, *native.formats()}
    # One kernel computes all matrices of a bank.
    products = [p for p in every_product(model) if not computed.issuperset(p.formats)]
    formats = dict.fromkeys(f for p in products for f in p.formats if f not in computed)
    stacks = [stack for product in products for stack in product.stacks]
    if not stacks:
        return ""
    stored, floats = sum(s.nbytes for s in stacks), 4 * sum(s.size for s in stacks)
    return (
        f"no fast kernel computes {', '.join(formats)}; torch does, on float32 copies made at "
        f"their first use: {byte_size(floats)} for {byte_size(stored)}; load(..., "
        f"convert={dict.fromkeys(formats, 'q8_0')}) makes what kernels compute"
    )
