"""What a device takes: decoded in pieces, on several threads, rounded once."""

import numpy as np
import pytest
import torch

from ktlab.kernels import packing, seat
from ktlab.kernels.seat import TorchSeat
from ktlab.quantization import QTensor, get_format

ROWS, COLS = 100, 256


def tensor(format: str) -> QTensor:
    values = np.random.default_rng(0).standard_normal((2, ROWS, COLS), np.float32)
    known = get_format(format)
    return QTensor(name="w", format=known, shape=values.shape, blocks=known.quantize(values))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("format", ["q4_k", "bf16", "q4_1"])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_pieces_give_the_whole(
    format: str, dtype: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven rows at a time, so the last piece is shorter and one has rows of both matrices."""
    monkeypatch.setattr(seat, "LOADED_AT_ONCE", 7 * COLS)
    monkeypatch.setattr(seat, "GRAIN", 500)
    monkeypatch.setattr(seat, "default_threads", lambda: threads)
    here, stored = TorchSeat("cuda:0", "cpu", dtype), tensor(format)
    there = here.load(stored)
    assert torch.equal(there, torch.from_numpy(stored.dequantize()).to(here.dtype))
    assert here.here_bytes == {"weights": there.nbytes}


def test_pieces_load_in_inference_mode_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which holds in the thread of who asks, not in those that write."""
    monkeypatch.setattr(seat, "LOADED_AT_ONCE", 7 * COLS)
    stored = tensor("q4_k")
    with torch.inference_mode():
        there = TorchSeat("cuda:0", "cpu", "f32").load(stored)
    assert torch.equal(there, torch.from_numpy(stored.dequantize()))


def test_a_piece_that_fails_is_told_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seat, "LOADED_AT_ONCE", 7 * COLS)
    calls = []

    def rows(some: QTensor) -> np.ndarray:
        calls.append(some)
        if len(calls) == 5:
            raise MemoryError("no room")
        return some.dequantize()

    monkeypatch.setattr(packing, "rows", rows)
    here = TorchSeat("cuda:0", "cpu")
    with pytest.raises(MemoryError, match="no room"):
        here.load(tensor("q4_k"))
    assert not here.here_bytes
