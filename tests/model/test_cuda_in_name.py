"""What only CUDA has, streams, room and waiting, on a GPU that is one in name."""

import gc
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ktlab.errors import ContextError, PlacementError
from ktlab.kernels import int4, seat
from ktlab.kernels.seat import TorchSeat
from ktlab.model.interrupt import interruptible
from ktlab.model.model import Model
from ktlab.model.place_room import needed_bytes
from ktlab.placement import Placement
from ktlab.quantization import QTensor
from tests.model.cuda_in_name import Event, Stream, There, cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
IDS = torch.arange(3, 40)
GPU = torch.device("cuda:0")


@pytest.fixture(scope="module")
def usual(loaded: Model) -> Placement:
    found = Placement.everywhere(loaded.config, "cpu")
    for component in ("attention", "shared", "dense", "output", "router"):
        found = found.put(component, "cuda:0")
    found = found.put("experts", "cuda:0", experts=range(0, 64, 8))
    return found.put("experts", "cuda:0", experts=range(0, 64, 7), phase="prefill")


@pytest.fixture(scope="module")
def nbytes(loaded: Model, usual: Placement) -> int:
    return needed_bytes(loaded, usual, {"cuda:0": TorchSeat("cuda:0", "cpu")})["cuda:0"]


def run(model: Model) -> Tensor:
    cache = model.new_cache(context=64)
    return torch.cat([model.forward(IDS, cache), model.forward(IDS[:1], cache)])


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "words", [{}, {"attention": "naive"}, {"deferred": 2}, {"dtype": "f32", "top_k": 4}]
)
def test_nothing_is_early_nothing_mixes(
    model: Model, usual: Placement, words: dict[str, Any]
) -> None:
    settings = {name: value for name, value in words.items() if name != "dtype"}
    with model.override(backend="torch", **settings):
        expected = run(model)
    with cuda() as gpu, model.override(placement=usual, **words):
        with model.watch_overlap() as overlap:
            found = run(model)
        assert overlap.calls
        ledger = model.ledger()["cuda:0"]
        assert ledger.total == gpu.allocated
        assert ledger.known <= gpu.allocated < 1.01 * ledger.known + 100_000
        gc.collect()
    assert not gpu.problems
    assert error(found, expected) < 0.03


def test_it_finds_what_is_left_out(
    model: Model, usual: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each wait that the code has, taken away."""
    with cuda() as gpu, model.override(placement=usual):
        model.forward(IDS)
        assert not gpu.problems
        for of, name in ((Stream, "wait_stream"), (Event, "synchronize"), (There, "record_stream")):
            with monkeypatch.context() as patch:
                patch.setattr(of, name, lambda *_: None)
                model.forward(IDS)
                gc.collect()
            assert gpu.problems, name
            gpu.problems.clear()


@pytest.mark.parametrize("words", [{}, {"deferred": 2}, {"mask": {3: [0, 1]}}])
def test_a_token_waits_once_a_layer(model: Model, usual: Placement, words: dict[str, Any]) -> None:
    """For what the router chose; then for the last hidden numbers, and the logits."""
    with cuda() as gpu, model.override(placement=usual, **words):
        cache = model.new_cache(context=64)
        for watched in (model, interruptible(model, threading.Event())):
            watched.forward(IDS[:1], cache)  # norms are taken there at their first use
            gpu.waits = 0
            watched.forward(IDS[:1], cache)
            assert gpu.waits == len(model.moe_blocks) + 2


def test_room_that_came_back_can_be_used_again(model: Model, usual: Placement, nbytes: int) -> None:
    """torch keeps what was freed, which the driver calls taken."""
    with cuda(nbytes * 3 // 2) as gpu:
        for _ in range(2):
            with model.override(placement=usual):
                assert gpu.allocated > nbytes
            assert gpu.allocated < 100_000 and gpu.reserved > nbytes
        model.place(usual)
        model.place(Placement.everywhere(model.config, "cpu"))
        assert gpu.reserved < 100_000, "given to others, who may want it"


def test_an_error_that_is_kept_keeps_no_memory(
    model: Model, nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """IPython keeps the last one, with its frames, for %debug."""
    monkeypatch.setattr("ktlab.model.place.check_room", lambda *_: None)
    experts = Placement.everywhere(model.config, "cpu").put("experts", "cuda:0")
    with cuda(nbytes // 2) as gpu:
        with pytest.raises(PlacementError, match="ran out of memory at .*experts") as kept:
            model.place(experts)
        gc.collect()
        assert gpu.allocated == 0 and model.placement is None
        assert kept.value.__cause__ is not None


def test_a_full_device_is_no_reason_against_4_bits(model: Model, usual: Placement) -> None:
    with cuda(1000):
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                int4.reason(GPU, torch.bfloat16, 128)
        with pytest.raises(PlacementError, match="a device ran out of memory at the beginning"):
            model.place(usual, dtype="int4")
    assert model.placement is None


def test_a_device_that_fails_at_once_is_told(
    model: Model, usual: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: out of memory")

    with cuda():
        monkeypatch.setattr(torch.cuda, "Stream", failing)
        with pytest.raises(PlacementError, match="a device failed at the beginning .* nvidia-smi"):
            model.place(usual)


def test_a_cache_that_has_no_room_is_told(model: Model, usual: Placement, nbytes: int) -> None:
    with cuda(nbytes * 3 // 2), model.override(placement=usual):
        with pytest.raises(ContextError, match="4096 tokens needs .* of cuda:0 are available"):
            model.new_cache(64, 4096)


def test_threads_that_load_follow_the_stream_of_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seat, "LOADED_AT_ONCE", 32)
    stored = QTensor.from_array("w", np.ones((8, 32), np.float32))
    with cuda() as gpu, gpu.use(Stream(gpu)):
        assert bool((TorchSeat("cuda:0", GPU).load(stored).cpu() == 1).all())
    assert not gpu.problems
