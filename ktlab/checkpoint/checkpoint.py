"""What a checkpoint is: a configuration, named tensors, maybe a tokenizer; wherever they lie."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

from ktlab.checkpoint.config import ModelConfig
from ktlab.checkpoint.names import Shape, expected_tensors
from ktlab.checkpoint.tokenizer import Tokenizer
from ktlab.errors import CheckpointError, nearest
from ktlab.html import byte_size, card, details, mimebundle, pairs, table
from ktlab.quantization import QTensor

SAMPLE_BYTES = 4096
"""So many bytes from the middle of each tensor go into a fingerprint."""
SHOWN = 200
"""Tensors listed in the HTML of a checkpoint."""


@runtime_checkable
class Checkpoint(Protocol):
    """Source of weights. Tensors have the canonical names and shapes of `names.py`."""

    name: str
    path: Path | None
    files: tuple[Path, ...]
    config: ModelConfig

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def metadata(self) -> Mapping[str, object]: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def names(self) -> list[str]: ...

    def tensor(self, name: str) -> QTensor: ...

    def check_unchanged(self) -> None: ...

    def listing(self) -> list[tuple[str, str, Shape, int]]: ...


class CheckpointView:
    """What every kind of checkpoint shows of itself: text, HTML, bytes by format."""

    name: str
    path: Path | None
    files: tuple[Path, ...] = ()
    """What the weights are read from; none in memory."""
    config: ModelConfig

    @property
    def ignored(self) -> Sequence[str]:
        """Tensors in the files that the model has no use for and is right without."""
        return ()

    def names(self) -> list[str]:
        raise NotImplementedError

    def tensor(self, name: str) -> QTensor:
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(self.formats.values())

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if what the weights are read from was written to since then."""

    def stored(self) -> Iterator[QTensor]:
        """The tensors as they are kept, none derived from another."""
        return map(self.tensor, self.names())

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell these weights from others.

        A hash over every tensor's name, shape, format and one page of its bytes: a file is mapped,
        and reading all of it to name it would take as long as loading it (16 stretches of each
        tensor took 47 s for the 404 GB of DeepSeek-V3, for each fault reads ahead).
        """
        digest = hashlib.sha256()
        for tensor in self.stored():
            digest.update(f"{tensor.name} {tensor.shape} {tensor.format.name}".encode())
            raw = tensor.blocks.reshape(-1)
            start = max(0, (len(raw) - SAMPLE_BYTES) // 2)
            digest.update(raw[start : start + SAMPLE_BYTES].tobytes())
        return digest.hexdigest()[:16]

    def listing(self) -> list[tuple[str, str, Shape, int]]:
        """(name, format, shape, bytes) of each tensor as it is stored; nothing is decoded."""
        tensors = map(self.tensor, self.names())
        return [(t.name, t.format.name, t.shape, t.nbytes) for t in tensors]

    @property
    def formats(self) -> dict[str, int]:
        """{format name: bytes kept in it}, the largest first."""
        totals: dict[str, int] = {}
        for _, format, _, nbytes in self.listing():
            totals[format] = totals.get(format, 0) + nbytes
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def __repr__(self) -> str:
        config = self.config
        formats = ", ".join(f"{n} {byte_size(b)}" for n, b in self.formats.items())
        ignored = f"; not used: {some(self.ignored)}" if self.ignored else ""
        return (
            f"{type(self).__name__}({self.name}: {config.architecture}, "
            f"{config.num_layers} layers, {config.num_experts} experts, "
            f"top {config.top_k}; {len(self.names())} tensors, {formats}{ignored})"
        )

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        config = self.config
        facts = {
            "file": self.path or "in memory",
            "layers": f"{config.num_layers} ({config.first_dense_layers} dense, "
            f"{len(config.moe_layers)} with experts)"
            + (
                f"; {config.num_nextn_layers} for next-token prediction, not run"
                if config.num_nextn_layers
                else ""
            ),
            "experts": f"{config.num_experts} routed, top {config.top_k}, "
            f"{config.num_shared_experts} shared; {config.gating} gate, "
            f"{config.topk_group} of {config.n_group} groups",
            "attention": str(config.attention),
            "formats": ", ".join(f"{n} {byte_size(b)}" for n, b in self.formats.items()),
        }
        if self.ignored:
            facts["not used"] = some(self.ignored)
        rows = self.listing()
        headers = ("name", "format", "shape", "bytes")
        shown = [(n, f, "×".join(map(str, s)), b) for n, f, s, b in rows[:SHOWN]]
        more = f", the first {SHOWN}" if len(rows) > SHOWN else ""
        listing = details(f"{len(rows)} tensors{more}", table(shown, headers))
        return mimebundle(repr(self), card(self.name, pairs(facts), listing))


class MemoryCheckpoint(CheckpointView):
    """A checkpoint whose tensors are given: for tests, experiments and conversions."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, QTensor],
        tokenizer: Tokenizer | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        check_tensors(config.name, config, shapes)
        self.name = config.name
        self.path = None
        self.config = config
        self.tokenizer = tokenizer
        self.metadata: Mapping[str, object] = dict(metadata or {})
        self._tensors = dict(tensors)

    def names(self) -> list[str]:
        """Canonical names of all tensors."""
        return list(expected_tensors(self.config))

    def tensor(self, name: str) -> QTensor:
        """The tensor of that name; CheckpointError with the nearest name otherwise."""
        if name not in self._tensors:
            raise unknown_tensor(self.name, name, self._tensors)
        return self._tensors[name]


def check_tensors(
    where: str, config: ModelConfig, shapes: Mapping[str, Shape], problems: Iterable[str] = ()
) -> None:
    """Refuse a set of tensors that is not what the configuration needs; all faults together."""
    expected = expected_tensors(config)
    found = list(problems)
    for name, shape in expected.items():
        if name not in shapes:
            found.append(f"{name} is missing (expected shape {shape}){nearest(name, shapes)}")
        elif shapes[name] != shape:
            found.append(f"{name} has shape {shapes[name]}, expected {shape}")
    if found:
        raise CheckpointError(together(where, found, "convert the original checkpoint again"))


def together(where: str, problems: list[str], advice: str, limit: int = 20) -> str:
    """One message for all problems: the first `limit` in full, then how many more."""
    if len(problems) == 1:
        return f"{where}: {problems[0]}; {advice}"
    lines = problems[:limit]
    if len(problems) > limit:
        lines.append(f"... and {len(problems) - limit} more")
    return f"{where}: {len(problems)} problems; {advice}:\n  " + "\n  ".join(lines)


def some(names: Iterable[str], limit: int = 4) -> str:
    """The first `limit` of them, for a message."""
    listed = list(names)
    return ", ".join(listed[:limit]) + (", ..." if len(listed) > limit else "")


def unknown_tensor(where: str, name: str, known: Iterable[str]) -> CheckpointError:
    return CheckpointError(f'{where}: there is no tensor "{name}"{nearest(name, known)}')
