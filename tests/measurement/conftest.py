"""Models for the tests here: a real one with random weights, and one whose answers are known."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.measurement import speed
from ktlab.measurement.roofline import Ceilings
from ktlab.model.model import Model


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine would make these tests slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def known_ceilings() -> Iterator[Ceilings]:
    """Spares measuring the machine, and lets shares of the ceiling be known."""
    ceilings = Ceilings(
        gemm_flops=1e9, bandwidth={"1000000": 1e10, "100000000": 1e9}, threads=1, seconds=0.0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "measure_machine", lambda: ceilings)
        yield ceilings


@pytest.fixture(scope="session")
def model() -> Model:
    return Model(synthesize(TINY_TEST_CONFIG, seed=0))


@pytest.fixture(scope="session")
def ids() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (600,), generator=generator)


@dataclass(frozen=True)
class FakeSettings:
    values: tuple[tuple[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return dict(self.values)


class FakeModel:
    """Logits are a function of the last token and of one setting, `shift`; forwards are counted.

    `clock` is advanced by `seconds` for every token, so that speeds are known exactly.
    """

    name = "fake"
    nbytes = 1 << 20

    def __init__(self, vocab: int = 32, context: int = 512) -> None:
        self.config = SimpleNamespace(vocab_size=vocab, context_length=context)
        self.table_VV = torch.from_numpy(np.random.default_rng(0).normal(size=(vocab, vocab)))
        self.direction_V = torch.from_numpy(np.random.default_rng(1).normal(size=vocab))
        self.checkpoint = SimpleNamespace(tokenizer=None)
        self.settings = FakeSettings()
        self.log: list[tuple[dict[str, Any], int]] = []
        self.clock = SimpleNamespace(now=0.0)

    @property
    def tokenizer(self) -> Any:
        return self.checkpoint.tokenizer

    def clone(self) -> "FakeModel":
        twin = FakeModel(self.config.vocab_size, self.config.context_length)
        twin.__dict__.update(self.__dict__)
        return twin

    @contextmanager
    def override(self, **changes: Any) -> Iterator["FakeModel"]:
        before = self.settings
        self.settings = replace(
            before, values=tuple(sorted({**before.to_dict(), **changes}.items()))
        )
        yield self
        self.settings = before

    def logits(self, ids_T: Tensor, settings: Mapping[str, Any]) -> Tensor:
        return self.table_VV[ids_T] + settings.get("shift", 0.0) * self.direction_V

    def forward(self, ids: Tensor, cache: object = None) -> Tensor:
        settings = self.settings.to_dict()
        self.log.append((settings, len(ids)))
        self.clock.now += len(ids) * settings.get("seconds", 0.001)
        return self.logits(torch.as_tensor(ids), settings).float()

    def new_cache(self, batch: int = 1, context: int | None = None) -> object:
        return object()

    def cost(self, tokens: int = 1, context: int = 512) -> Any:
        return SimpleNamespace(flop=2e6 * tokens, bytes=1e6)


@pytest.fixture
def fake() -> FakeModel:
    return FakeModel()
