"""A forward pass that stops between two stages."""

import threading

import pytest
import torch

from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.model.interrupt import Interrupted, interruptible
from ktlab.model.model import Model
from ktlab.probe import Probe


def test_the_same_logits_until_cancelled_and_settings_restored():
    model, cancel = Model(synthesize(TINY_TEST_CONFIG)), threading.Event()
    stoppable = interruptible(model, cancel)
    ids = [1, 2, 3, 4]
    assert torch.equal(stoppable.forward(ids), model.forward(ids))
    before = stoppable.settings
    cancel.set()
    with pytest.raises(Interrupted), stoppable.override(top_k=2):
        stoppable.forward(ids)
    with pytest.raises(Interrupted):
        stoppable.clone().generate(ids)
    with pytest.raises(Interrupted), stoppable.override(quantize="q4_0"):
        pass
    assert stoppable.settings == before
    assert torch.isfinite(model.forward(ids)).all()


def test_stops_before_the_head():
    cancel = threading.Event()
    model = interruptible(Model(synthesize(TINY_TEST_CONFIG)), cancel)
    last = f"layers.{len(model.layers) - 1}.shared"

    class Press(Probe):
        def stage(self, name):
            if name == last:
                cancel.set()
            return super().stage(name)

    with pytest.raises(Interrupted):
        model.forward([1, 2, 3, 4], probe=Press())
    assert cancel.is_set()
