"""A small written file, shared by the tests of this folder."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ktlab.checkpoint import MemoryCheckpoint, write_gguf
from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize


def save(checkpoint: MemoryCheckpoint, path: Path) -> Path:
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    return write_gguf(path, checkpoint.config, tensors, checkpoint.tokenizer)


@pytest.fixture(scope="session")
def checkpoint() -> MemoryCheckpoint:
    return synthesize(TINY_TEST_CONFIG, formats={"*exps*": "q8_0", "*": "q4_k"})


@pytest.fixture(scope="session")
def gguf_path(checkpoint: MemoryCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(checkpoint, tmp_path_factory.mktemp("gguf") / "small.gguf")


@pytest.fixture
def damaged(gguf_path: Path, tmp_path: Path) -> Callable[[Callable[[bytearray], object]], Path]:
    """A copy of the file after `change(its bytes)`."""

    def make(change: Callable[[bytearray], object]) -> Path:
        content = bytearray(gguf_path.read_bytes())
        changed = change(content)
        path = tmp_path / "damaged.gguf"
        path.write_bytes(changed if isinstance(changed, bytes | bytearray) else content)
        return path

    return make
