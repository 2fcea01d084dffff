"""What tests of placed models share; a file's own fixtures count more."""

from collections.abc import Iterator

import pytest

import ktlab
from ktlab.model.model import Model


@pytest.fixture(scope="module")
def loaded() -> Model:
    return ktlab.load("tiny")


@pytest.fixture
def model(loaded: Model) -> Iterator[Model]:
    yield loaded.clone()
