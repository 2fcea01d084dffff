"""Sizes as people write them; disks and decode from them."""

from pathlib import Path

import pytest

from ktlab.errors import SettingError
from ktlab.html import decimal_bytes
from ktlab.memory import disk_rate, memory, resident_bytes
from ktlab.model.from_disk import from_disk
from ktlab.placement.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("382GB", 382 * 10**9),
        ("24GiB", 24 * 2**30),
        (" 1.5 TB ", 15 * 10**11),
        ("14g", 14 * 10**9),
        ("1,000 MB", 10**9),
        ("512", 512),
        (1e9, 10**9),
        (7, 7),
    ],
)
def test_sizes(text: "str | float", size: int) -> None:
    assert parse_size("ram", text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 GHz", "nan", "1e400", float("inf"), 0, None])
def test_no_sizes(text: object) -> None:
    with pytest.raises(SettingError, match="vram="):
        parse_size("vram", text)  # type: ignore[arg-type]


def test_text() -> None:
    assert [decimal_bytes(n) for n in (404488847360, 9_180_000, 999_999, 12)] == [
        "404 GB", "9.18 MB", "1 MB", "12 B",
    ]  # fmt: skip


def test_what_every_token_reads_stays_in_memory() -> None:
    """Room for half of the experts beside the rest: half of a token's experts are missed."""
    found = from_disk((), capacity=60, experts=100, others=10, experts_per_token=8, rate=40.0)
    assert found is not None
    assert (found.missing_bytes, found.bytes_per_token, found.tokens_per_s) == (50, 4.0, 10.0)
    assert from_disk((), capacity=110, experts=100, others=10, experts_per_token=8) is None
    starved = from_disk((), capacity=-5, experts=100, others=10, experts_per_token=8)
    assert starved is not None and starved.bytes_per_token == 18


def test_a_disk_is_measured_or_left_out(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(bytes(1000))
    assert disk_rate(small) is None
    large = tmp_path / "large"
    large.write_bytes(bytes(32 << 20))
    rate = disk_rate(large, seconds=0.05)
    assert rate is None or rate > 1e6


def test_memory_and_what_is_resident() -> None:
    import numpy as np

    from ktlab.checkpoint import data_path

    assert memory().total
    path = data_path("tiny.gguf")
    mapped = np.memmap(path, np.uint8, "r")
    before = resident_bytes([path])
    mapped.sum()
    after = resident_bytes([path])
    if after is not None and before is not None:  # /proc is there
        assert after - before > 0.5 * len(mapped)
