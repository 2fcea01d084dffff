"""What is not as planned is flagged, kind by kind; what explains a difference has its bytes."""

from collections.abc import Iterator
from dataclasses import replace
from shutil import copy2
from typing import Any

import pytest
import torch

import ktlab
from ktlab.checkpoint.embedded import data_path
from ktlab.experts.placed_bank import PlacedBank
from ktlab.html import decimal_bytes
from ktlab.kernels import native
from ktlab.model.byte_ledger import INT4_ZEROS, NOT_MATRICES, DeviceBytes
from ktlab.model.model import Model
from ktlab.placement import Placement, Plan, measured
from tests.model.test_nodes import two_nodes  # noqa: F401
from tests.placement.test_measured import rows

GB = 10**9
STAND_IN = {"cuda:0": "cpu"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of its own: what other tests have mapped of the embedded one is counted, too."""
    return str(copy2(data_path("tiny.gguf"), tmp_path_factory.mktemp("flags")))


@pytest.fixture(scope="module")
def model(tiny: str) -> Model:
    return ktlab.load(tiny)


def on_devices(model: Model) -> Placement:
    found = Placement.everywhere(model.config, "cpu")
    for component in ("attention", "router", "shared", "dense", "output", "embedding"):
        found = found.put(component, "cuda:0")
    found = found.put("experts", "cuda:0", experts=range(16))
    return found.put("experts", "numa:0", experts=range(16, 24))


@pytest.fixture(scope="module")
def plan(tiny: str, model: Model) -> Plan:
    return ktlab.plan(tiny, placement=on_devices(model), gpu_formats="bf16", context=256)


def changed(one: DeviceBytes, word: str) -> DeviceBytes:
    """A ledger's device with 2 GB more of something."""
    more: Any = 2 * GB + (getattr(one, word) or 0)
    return replace(one, **{word: more})


@pytest.mark.parametrize(
    ("device", "word", "kind"),
    [
        ("cpu", "weights", "weights"),
        ("cpu", "converted", "converted"),
        ("cpu", "copies", "copies"),
        ("cpu", "cache", "cache"),
        ("cpu", "total", "activations, runtime"),
        ("numa:0", "copies", "weights"),
        ("cuda:0", "cache", "cache"),
        ("cuda:0", "total", "activations, runtime"),
    ],
)
def test_a_wrong_figure_is_flagged(
    model: Model, plan: Plan, monkeypatch: pytest.MonkeyPatch, device: str, word: str, kind: str
) -> None:
    with model.override(placement=plan, stand_in=STAND_IN):
        right = model.ledger()
        before = {(row.device, row.kind) for row in plan.measured(model).flagged}
        assert before <= {("cpu", "activations, runtime")}, "what other tests have in this process"
        devices = tuple(changed(d, word) if d.device == device else d for d in right.devices)
        monkeypatch.setattr(Model, "ledger", lambda self: replace(right, devices=devices))
        flagged = {(row.device, row.kind) for row in plan.measured(model).flagged}
    assert flagged - before <= {(device, kind)} and (device, kind) in flagged


def test_what_is_on_a_device_twice_is_flagged(model: Model, plan: Plan) -> None:
    with model.override(placement=plan, stand_in=STAND_IN):
        leak = model.seats["cuda:0"].hold(torch.zeros(10_000_000))
        (row,) = [row for row in plan.measured(model).flagged if row.device == "cuda:0"]
        assert row.kind == "weights" and f"{NOT_MATRICES} 40 MB" in row.why
        del leak
        assert "cuda:0" not in {row.device for row in plan.measured(model).flagged}


def test_other_formats_than_planned_explain_as_many_weights(model: Model, plan: Plan) -> None:
    with model.override(placement=plan, stand_in=STAND_IN, dtype="int4"):
        row = rows(plan.measured(model), "cuda:0")["weights"]
        assert not row.near and row.explained
        assert row.why.startswith("planned as bf16+f32, there as int4 ")


def test_int4_has_a_zero_beside_each_scale(
    tiny: str, model: Model, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also: what a seat of 4 bits holds in 16 is counted so, and planned so."""
    monkeypatch.setattr(measured, "SMALL", 0)
    monkeypatch.setattr(measured, "NEAR", 0.005)
    planned = ktlab.plan(tiny, placement=on_devices(model), context=256)
    with model.override(placement=planned, stand_in=STAND_IN, dtype="int4"):
        formats = model.ledger()["cuda:0"].formats
        found = rows(planned.measured(model), "cuda:0")["weights"]
        leak = model.seats["cuda:0"].hold(torch.zeros(1_000_000))
        flagged = rows(planned.measured(model), "cuda:0")["weights"]
        del leak
        per_head = [
            b.attention.linears[name].stack for b in model.layers for name in ("k_b", "v_b")
        ]
    numbers = sum(stack.size for stack in per_head) + model.embedding.size
    assert formats["bf16"] == 2 * numbers and formats["f32"] == 4 * 6 * 64 * 256
    assert found.explained
    assert found.difference == pytest.approx(formats.get(INT4_ZEROS, 0), abs=5000)
    if INT4_ZEROS in formats:  # where torch's product of 4 bits passes its check
        zeros = decimal_bytes(formats[INT4_ZEROS])
        assert not found.near
        assert found.why.startswith(
            f"torch packs a zero beside each scale of 4 bits, {zeros}: 4.25"
        )
    assert not flagged.explained and not flagged.near


def test_caches_of_other_forms_and_lengths(tiny: str, model: Model) -> None:
    planned = ktlab.plan(tiny, context=256)
    with model.override(attention="naive"):
        kept = model.new_cache(context=4096)
        row = rows(planned.measured(model), "cpu")["cache"]
    assert row.measured == kept.nbytes and not row.near and row.explained
    assert row.why == "1 alive, of 4,096 positions; planned 256, naive where absorbed is planned"


# The host's copy of what devices compute ---------------------------------------------------------


def test_the_host_copy_has_a_figure(tiny: str, model: Model, plan: Plan) -> None:
    """24 of 64 experts are on a GPU and a node, and in the mapped file still."""
    experts = sum(block.experts.nbytes for block in model.moe_blocks)
    says = "host copy of experts that are on devices: "
    expected = f"{says}{decimal_bytes(experts * 24 // 64)} of the mapped file, in memory where"
    assert [note for note in plan.notes if note.startswith(expected)]
    assert not [note for note in ktlab.plan(tiny).notes if note.startswith(says)]
    fresh = ktlab.load(tiny)
    with fresh.override(placement=plan, stand_in=STAND_IN):
        (note,) = [n for n in fresh.ledger()["cpu"].notes if n.startswith(says)]
        assert note.startswith(expected) and "made of it" not in note
        assert f"cpu: {note}" in str(plan.measured(fresh))
        fresh.forward(torch.arange(3, 40))
        (note,) = [n for n in fresh.ledger()["cpu"].notes if n.startswith(says)]
        assert native.unavailable() or "made of it, which stay" in note, "packed, all experts"
    assert not [n for n in fresh.ledger()["cpu"].notes if n.startswith(says)]


def test_the_host_copy_of_what_was_converted_stays(tiny: str, model: Model) -> None:
    made = {"q8_0": "q4_0"}
    planned = ktlab.plan(tiny, placement=on_devices(model), convert=made, gpu_formats="bf16")
    loaded = ktlab.load(tiny, convert=made)
    size = sum(block.experts.nbytes for block in loaded.moe_blocks) * 24 // 64
    says = f"host copy of experts that are on devices: {decimal_bytes(size)} made of it, which stay"
    assert says in planned.notes
    assert loaded.ledger()["cpu"].converted >= sum(b.experts.nbytes for b in loaded.moe_blocks)
    with loaded.override(placement=planned, stand_in=STAND_IN):
        assert says in loaded.ledger()["cpu"].notes


# NUMA nodes --------------------------------------------------------------------------------------


@pytest.fixture
def shared(model: Model, two_nodes: None) -> Iterator[Model]:  # noqa: F811
    if native.unavailable():
        pytest.skip("no native kernels here")
    yield model.clone()


@pytest.mark.parametrize(("mode", "sets"), [("interleave", 1), ("split", 1), ("copy", 2)])
def test_sets_on_nodes_are_planned_as_they_are_made(
    tiny: str, shared: Model, mode: str, sets: int
) -> None:
    right, wrong = (ktlab.plan(tiny, numa_copies=n, context=256) for n in (sets, 3 - sets))
    shared.place(right, nodes=mode)
    experts = sum(block.experts.nbytes for block in shared.moe_blocks)
    found = right.measured(shared)
    row = rows(found, "cpu")["copies"]
    assert row.near and row.planned == sets * experts
    assert row.why == (
        "packed, beside the mapped file; the plan's ledger has "
        f"{decimal_bytes(experts)} of them as weights"
    )
    assert {row.kind for row in found.flagged} <= {"activations, runtime"}
    (host,) = [one for one in right.ledgers if one.device == "cpu"]
    planned = [r.planned for r in found.rows if r.kind in ("weights", "converted", "copies")]
    assert sum(planned) == host.weights + host.converted + host.copies, "counted once"
    flagged = {row.kind: row.why for row in wrong.measured(shared).flagged}
    assert (
        f"numa_copies={3 - sets}; placed with nodes={mode!r}, which makes {sets}"
        in (flagged["copies"])
    )


def test_copies_that_nobody_made_are_flagged(tiny: str, model: Model) -> None:
    flagged = {row.kind: row.why for row in ktlab.plan(tiny, numa_copies=2).measured(model).flagged}
    assert flagged["copies"] == "planned as numa_copies=2; placed without nodes=, which makes 1"


def test_a_node_with_experts_of_its_own_and_a_share(tiny: str, shared: Model) -> None:
    placed = Placement.everywhere(shared.config, "cpu").put("experts", "numa:0", experts=range(16))
    placed = placed.put("attention", "numa:0")
    planned = ktlab.plan(tiny, placement=placed, context=256)
    shared.place(planned, nodes="interleave")
    cache = shared.new_cache(context=256)
    found = planned.measured(shared)
    node = rows(found, "numa:0")["weights"]
    assert not node.near and node.explained
    bank = shared.layers[2].experts
    assert isinstance(bank, PlacedBank) and bank.team is not None
    share = len(shared.moe_blocks) * bank.team.parts[0].nbytes
    assert f"{decimal_bytes(share)} are a share of nodes='interleave'" in node.why
    assert "that are no experts are counted with cpu" in node.why
    host = rows(found, "cpu")
    assert host["cache"].planned == host["cache"].measured == cache.nbytes
    assert {row.kind for row in found.flagged} <= {"activations, runtime"}
