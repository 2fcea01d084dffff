"""NUMA nodes: what is shared among them, told where there is only one.

No machine of the tests has two nodes: two processors stand for two here, which computes everything
as two nodes do, in one memory.
"""

from collections.abc import Iterator

import pytest
import torch

import ktlab
from ktlab.errors import PlacementError
from ktlab.experts import nodes as experts_nodes
from ktlab.experts.placed_bank import PlacedBank
from ktlab.kernels import native, threads
from ktlab.model import place_seats
from ktlab.model.model import Model
from ktlab.placement import Placement

IDS = torch.arange(3, 40)


@pytest.fixture(scope="module")
def model() -> Model:
    return ktlab.load("tiny")


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cpus = threads.allowed_cpus()
    found = {0: cpus[:1], 1: cpus[-1:]}
    for module in (threads, experts_nodes, place_seats):
        monkeypatch.setattr(module, "numa_nodes", lambda: found)
    for cached in (threads.default_threads, native._pool):
        cached.cache_clear()
    yield
    for cached in (threads.default_threads, native._pool):
        cached.cache_clear()


def everywhere(model: Model) -> Placement:
    return Placement.everywhere(model.config, "cpu")


@pytest.mark.skipif(bool(native.unavailable()), reason="no native kernels here")
@pytest.mark.parametrize(("mode", "copies"), [("interleave", 1), ("split", 1), ("copy", 2)])
def test_nodes_share_the_experts(model: Model, two_nodes: None, mode: str, copies: int) -> None:
    twin = model.clone()
    expected = twin.forward(IDS), twin.forward(IDS[:1])
    twin.place(everywhere(model), nodes=mode)
    bank = twin.layers[2].experts
    assert isinstance(bank, PlacedBank) and bank.team is not None
    assert [part.node for part in bank.team.parts] == [0, 1]
    assert bank.placement == f"numa:0, numa:1 ({mode})"
    assert bank.team.nbytes == pytest.approx(copies * bank.nbytes, rel=0.35)
    for found, before in zip((twin.forward(IDS), twin.forward(IDS[:1])), expected, strict=True):
        assert float((found - before).norm() / before.norm()) < 0.02
    ledger = twin.ledger()
    assert {one.device for one in ledger.devices} == {"cpu", "numa:0", "numa:1"}
    assert ledger["cpu"].copies == sum(b.experts.team.nbytes for b in twin.moe_blocks)  # type: ignore
    assert mode in str(twin.settings.placement["nodes"])
    elsewhere = everywhere(model).put("shared", "cuda:0")
    with twin.override(placement=elsewhere, stand_in={"cuda:0": "cpu"}):
        assert getattr(twin.layers[2].experts, "across", None) == mode  # nobody said otherwise
    with twin.override(placement=everywhere(model), nodes="none"):
        assert torch.equal(twin.forward(IDS), expected[0])
    assert getattr(twin.layers[2].experts, "across", None) == mode
    twin.place(everywhere(model), nodes="none")
    assert torch.equal(twin.forward(IDS), expected[0])


@pytest.mark.skipif(bool(native.unavailable()), reason="no native kernels here")
def test_single_experts_on_nodes(model: Model, two_nodes: None) -> None:
    placed = everywhere(model).put("experts", "numa:0", experts=range(32))
    placed = placed.put("experts", "numa:1", experts=range(32, 64)).put("attention", "numa:1")
    expected = model.forward(IDS)
    with model.override(placement=placed):
        assert model.layers[1].attention.linears["output"].kernel.numa == 1
        found = model.forward(IDS)
    assert float((found - expected).norm() / expected.norm()) < 0.02
    assert model.layers[1].attention.linears["output"].kernel.numa is None


@pytest.mark.skipif(len(threads.numa_nodes()) > 1, reason="this machine has several NUMA nodes")
def test_one_node_says_so(model: Model) -> None:
    with pytest.raises(PlacementError, match=r"has [01] NUMA nodes?.*nothing to share"):
        model.place(everywhere(model), nodes="copy")
    with pytest.raises(PlacementError, match="nodes='both': expected one of interleave"):
        model.place(everywhere(model), nodes="both")
    assert model.placement is None


def test_a_copy_is_planned_first() -> None:
    one, two = (ktlab.plan("tiny", numa_copies=n) for n in (1, 2))
    experts = sum(r.bytes for r in one.rows if r.part.component == "experts")
    assert two["cpu"].needed - one["cpu"].needed == experts == two["cpu"].copies
    assert any("2 copies of the experts" in note for note in two.notes)
