"""The ledger of a loaded model beside its plan: bytes that agree, the rest explained or flagged."""

import pytest
import torch

import ktlab
from ktlab.errors import PlacementError
from ktlab.memory import node_bytes, process_memory
from ktlab.model import byte_ledger
from ktlab.model.model import Model
from ktlab.placement import Placement
from ktlab.placement.measured import PlanMeasured


@pytest.fixture(scope="module")
def model() -> Model:
    return ktlab.load("tiny")


@pytest.fixture(scope="module")
def placed(model: Model) -> Placement:
    found = Placement.everywhere(model.config, "cpu").put("attention", "cuda:0")
    found = found.put("output", "cuda:0").put("shared", "cuda:0")
    found = found.put("experts", "cuda:0", experts=range(16))
    return found.put("experts", "numa:0", experts=range(16, 24))


def rows(found: PlanMeasured, device: str) -> dict:
    return {row.kind: row for row in found.rows if row.device == device}


def test_every_byte_of_a_device_is_planned(model: Model, placed: Placement) -> None:
    plan = ktlab.plan("tiny", placement=placed, gpu_formats="bf16", context=256)
    with model.override(placement=plan, stand_in={"cuda:0": "cpu"}):
        cache = model.new_cache(context=256)
        model.forward(torch.arange(3, 40), cache)
        found = plan.measured(model)
        ledger = model.ledger()
    device = rows(found, "cuda:0")
    assert device["weights"].measured == pytest.approx(device["weights"].planned, rel=0.01)
    assert device["cache"].measured == device["cache"].planned == ledger["cuda:0"].cache > 0
    node = rows(found, "numa:0")["weights"]
    assert node.measured == pytest.approx(node.planned, rel=0.02)
    assert ledger["cuda:0"].total == ledger["cuda:0"].known, "nothing else is there"
    # What other tests have in this process is flagged, rightly.
    assert {row.device for row in found.flagged} <= {"cpu"}, found
    assert "copies that kernels made" in str(found) and "stand-ins" in str(found)
    assert PlanMeasured.from_json(found.to_json()) == found
    html = found._repr_mimebundle_()["text/html"]
    assert "explained" in html and "move_pages" not in html


def test_what_nothing_explains_is_flagged(
    model: Model, placed: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = process_memory() or 0
    monkeypatch.setattr(byte_ledger, "process_memory", lambda: taken + 2_000_000_000)
    found = ktlab.plan("tiny").measured(model)
    assert "activations, runtime" in {row.kind for row in found.flagged}
    assert "not explained" in str(found)
    with pytest.raises(PlacementError, match=r"differences, such as attention on cpu"):
        ktlab.plan("tiny", placement=placed).measured(model)


def test_nothing_is_left_on_a_device(model: Model, placed: Placement) -> None:
    with model.override(placement=placed, stand_in={"cuda:0": "cpu"}):
        seat = model.seats["cuda:0"]
        assert seat.here_bytes["weights"] > 1e6
    assert not seat.here_bytes and [d.device for d in model.ledger().devices] == ["cpu"]


def test_where_pages_are() -> None:
    values = torch.ones(1 << 20).numpy()
    found = node_bytes([values])
    if found is None:
        pytest.skip("the system does not say on which node a page is (move_pages)")
    assert sum(found.values()) == pytest.approx(values.nbytes, rel=0.01)
