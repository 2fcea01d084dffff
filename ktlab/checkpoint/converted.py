"""A checkpoint seen in other formats: tensors are converted when they are asked for."""

import hashlib
import weakref
from collections.abc import Mapping
from functools import cached_property

from ktlab.checkpoint.checkpoint import Checkpoint, CheckpointView
from ktlab.checkpoint.names import is_quantizable
from ktlab.checkpoint.tokenizer import Tokenizer
from ktlab.kernels import packing
from ktlab.quantization import Format, QTensor, fallback_format, get_format

Conversions = Mapping[str, str]
"""{format in the file: format wanted}, e.g. {"iq1_m": "q8_0", "bf16": "int8_channel"}."""


class ConvertedCheckpoint(CheckpointView):
    """`source` with the matrices of some formats converted; norms, biases and gates stay.

    As in llama.cpp, rows that do not fit the wanted format fall back. A converted tensor is kept as
    long as somebody holds it.
    """

    def __init__(self, source: Checkpoint, convert: Conversions) -> None:
        self.source = source
        self.convert: dict[Format, Format] = {}
        for found, wanted in convert.items():
            format = get_format(wanted)
            format.check_can_quantize()
            self.convert[get_format(found)] = format
        self.name, self.path, self.config = source.name, source.path, source.config
        self._kept: weakref.WeakValueDictionary[str, QTensor] = weakref.WeakValueDictionary()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The source's."""
        return self.source.tokenizer

    @property
    def metadata(self) -> Mapping[str, object]:
        """The source's."""
        return self.source.metadata

    @cached_property
    def fingerprint(self) -> str:
        """The source's, hashed with the conversions; nothing is converted for it."""
        changes = sorted((found.name, wanted.name) for found, wanted in self.convert.items())
        return hashlib.sha256(f"{self.source.fingerprint} {changes}".encode()).hexdigest()[:16]

    def names(self) -> list[str]:
        """Canonical names of all tensors."""
        return self.source.names()

    def tensor(self, name: str) -> QTensor:
        """The tensor of that name, converted if its format is among those named."""
        kept = self._kept.get(name)
        if kept is not None:
            return kept
        tensor = self.source.tensor(name)
        wanted = self.convert.get(tensor.format)
        if wanted is None or not is_quantizable(name, tensor.shape):
            return tensor
        found = packing.convert(tensor, fallback_format(wanted, tensor.shape[-1]))
        self._kept[name] = found
        return found
