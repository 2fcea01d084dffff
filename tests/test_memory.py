"""What this process gives back to the system."""

import sys

import pytest

from ktlab.memory import process_memory, trim

BLOCK, COUNT = 2000, 50_000


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's, on Linux")
def test_trimming_gives_freed_blocks_back() -> None:
    blocks = [bytes(BLOCK) for _ in range(COUNT)]
    last = bytes(BLOCK)  # what lies on top keeps the C library from giving back what is below
    blocks.clear()
    before = process_memory()
    trim()
    after = process_memory()
    assert before is not None and after is not None and last
    assert before - after > BLOCK * COUNT / 2
