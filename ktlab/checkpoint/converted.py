"""A checkpoint seen in other formats: tensors are converted when they are asked for."""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

import numpy as np

from ktlab.checkpoint.checkpoint import Checkpoint, CheckpointView
from ktlab.checkpoint.names import Shape, expected_tensors, is_quantizable
from ktlab.checkpoint.tokenizer import Tokenizer
from ktlab.errors import FormatError, nearest
from ktlab.kernels import packing
from ktlab.quantization import Format, QTensor, fallback_format, get_format

Conversions = Mapping[str, str]
"""{format in the file: format wanted}, e.g. {"iq1_m": "q8_0", "bf16": "int8_channel"}."""
Quantization = str | Mapping[str, str]
"""A format for all matrices, or {glob over tensor names: format} of which the first match counts,
e.g. {"*_exps*": "int4_group128", "*": "q8_0"}; no match leaves a matrix as it is."""
Progress = Callable[[float, float], None]
"""Called with (done, total) weights."""

FLOATS = ("f32", "f16", "bf16", "fp8_e4m3")
"""What `quantize` quantizes: anything else has been quantized before, and would lose twice."""


def wanted_format(
    name: str,
    shape: Shape,
    format: Format,
    convert: Mapping[Format, Format],
    quantize: Mapping[str, Format],
) -> Format:
    """What a tensor of `format` becomes: by its format, or by its name if it is still floats."""
    if not is_quantizable(name, shape):
        return format
    wanted = convert.get(format)
    if wanted is None and format.name in FLOATS:
        wanted = next((f for glob, f in quantize.items() if fnmatchcase(name, glob)), None)
    return fallback_format(wanted, shape[-1]) if wanted else format


class ConvertedCheckpoint(CheckpointView):
    """`source` with matrices converted; norms, biases and gates stay.

    `convert` goes by the format that a matrix has, `quantize` takes those that are still floats.
    As in llama.cpp, rows that do not fit the wanted format fall back. One matrix of a stack is
    converted after the other, and the file's pages behind it are given back: besides the result no
    more than one expert is in memory. A converted tensor is kept as long as somebody holds it.
    """

    def __init__(
        self,
        source: Checkpoint,
        convert: Conversions | None = None,
        *,
        quantize: Quantization | None = None,
    ) -> None:
        self.source = source
        self.convert = {get_format(f): _writable(wanted) for f, wanted in (convert or {}).items()}
        globs = {"*": quantize} if isinstance(quantize, str) else quantize or {}
        self.quantize = {glob: _writable(wanted) for glob, wanted in globs.items()}
        self.name, self.path, self.config = source.name, source.path, source.config
        self.files = source.files
        self._check_quantize()
        self._kept: weakref.WeakValueDictionary[str, QTensor] = weakref.WeakValueDictionary()
        self._converted: Callable[[int], None] | None = None

    def _check_quantize(self) -> None:
        """Refuse what would change nothing: a file without floats, a glob without a tensor."""
        if not self.quantize:
            return
        matrices = [n for n, s in expected_tensors(self.config).items() if is_quantizable(n, s)]
        for glob in self.quantize:
            if not any(fnmatchcase(name, glob) for name in matrices):
                raise FormatError(
                    f'{self.name}: quantize="{glob}" matches no matrix{nearest(glob, matrices)}; '
                    f"expected a glob over names such as {matrices[-1]}"
                )
        listing = self.source.listing()
        found = {format for name, format, shape, _ in listing if is_quantizable(name, shape)}
        if not found & set(FLOATS):
            have = ", ".join(sorted(found))
            raise FormatError(
                f"{self.name}: nothing to quantize, its matrices are {have} already; "
                f'convert={{"{sorted(found)[0]}": ...}} requantizes, and loses twice'
            )

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The source's."""
        return self.source.tokenizer

    @property
    def metadata(self) -> Mapping[str, object]:
        """The source's."""
        return self.source.metadata

    def check_unchanged(self) -> None:
        """Of the source."""
        self.source.check_unchanged()

    def names(self) -> list[str]:
        """Canonical names of all tensors."""
        return self.source.names()

    def tensor(self, name: str) -> QTensor:
        """The tensor of that name, converted if it is to be."""
        kept = self._kept.get(name)
        if kept is not None:
            return kept
        tensor = self.source.tensor(name)
        wanted = self._wanted(name, tensor)
        if wanted == tensor.format:
            self._report(tensor.size)
            return tensor
        found = self._kept[name] = self._convert(tensor, wanted)
        return found

    def _wanted(self, name: str, tensor: QTensor) -> Format:
        return wanted_format(name, tensor.shape, tensor.format, self.convert, self.quantize)

    def _convert(self, tensor: QTensor, format: Format) -> QTensor:
        blocks = np.empty((*tensor.shape[:-1], format.row_bytes(tensor.shape[-1])), np.uint8)
        targets = blocks.reshape(-1, *blocks.shape[-2:])
        for target, matrix in zip(targets, tensor.matrices(), strict=True):
            target[:] = packing.convert(_for_kernels(matrix, format), format).blocks
            packing.drop_pages(matrix.blocks)
            self._report(matrix.size)
        source = f"requantized from {tensor.format.name}"
        return QTensor(
            name=tensor.name, format=format, shape=tensor.shape, blocks=blocks, source=source
        )

    def listing(self) -> list[tuple[str, str, Shape, int]]:
        """(name, format, shape, bytes) of each tensor as it will be; converts nothing."""
        rows = []
        for name in self.names():
            tensor = self.source.tensor(name)
            format = self._wanted(name, tensor)
            nbytes = math.prod(tensor.shape[:-1]) * format.row_bytes(tensor.shape[-1])
            rows.append((name, format.name, tensor.shape, nbytes))
        return rows

    # Progress --------------------------------------------------------------------------------

    @contextmanager
    def reporting(self, progress: Progress) -> Iterator[None]:
        """Call `progress(done, total)` in weights as tensors come, inside the `with`."""
        shapes = expected_tensors(self.config)
        total, done = sum(map(math.prod, shapes.values())), 0

        def converted(weights: int) -> None:
            nonlocal done
            done += weights
            progress(done, total)

        self._converted = converted
        try:
            yield
        finally:
            self._converted = None

    def _report(self, weights: int) -> None:
        if self._converted is not None:
            self._converted(weights)


def _for_kernels(matrix: QTensor, format: Format) -> QTensor:
    """FP8 as float32 where the native kernels make `format`, which do not read FP8."""
    if matrix.format.name != "fp8_e4m3" or format.ggml_type is not None:
        return matrix
    return packing.floats(matrix)


def _writable(wanted: str) -> Format:
    format = get_format(wanted)
    format.check_can_quantize()
    return format
