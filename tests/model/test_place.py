"""A model on several devices: the same code on a stand-in that is strict about what is where."""

import gc
import threading
import weakref
from typing import Any

import pytest
import torch

import ktlab
from ktlab.errors import ContextError, PlacementError, SettingError
from ktlab.experts.placed_bank import Overlap, PlacedBank, Running
from ktlab.kernels.device_linear import DeviceLinear
from ktlab.kernels.int4 import dense
from ktlab.kernels.seat import HOST, TorchSeat
from ktlab.model import placed_block
from ktlab.model.interrupt import interruptible
from ktlab.model.model import Model
from ktlab.model.place_room import needed_bytes
from ktlab.placement import Placement
from ktlab.probe import Recorder
from tests.model.strict_seat import StrictSeat

IDS = torch.arange(3, 40)


@pytest.fixture(scope="module")
def cpu(loaded: Model) -> Placement:
    return Placement.everywhere(loaded.config, "cpu")


@pytest.fixture(scope="module")
def usual(cpu: Placement) -> Placement:
    """KTransformers' rule, with some experts of each layer on the device, others for prefill."""
    found = cpu
    for component in ("attention", "shared", "dense", "output", "router"):
        found = found.put(component, "cuda:0")
    found = found.put("experts", "cuda:0", experts=range(0, 64, 3))
    return found.put("experts", "cuda:0", experts=range(0, 64, 2), phase="prefill")


def run(model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a prompt, then of four tokens that follow it one by one."""
    cache = model.new_cache(context=64)
    prompt = model.forward(IDS, cache)
    steps = [model.forward(IDS[i : i + 1], cache) for i in range(4)]
    return prompt, torch.cat(steps)


def placed_bank(model: Model, layer: int) -> PlacedBank:
    bank = model.layers[layer].experts
    assert isinstance(bank, PlacedBank)
    return bank


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def floats(model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    """By torch, in float32: what every placement on an f32 device must give."""
    with model.override(backend="torch"):
        return run(model)


def test_everything_on_a_device_gives_the_same_numbers(model: Model, cpu: Placement) -> None:
    everywhere = Placement.everywhere(model.config, "cuda:0")
    expected = floats(model)
    with model.override(placement=everywhere, stand_in={"cuda:0": StrictSeat("cuda:0")}):
        assert model.placement is everywhere
        found = run(model)
    assert model.placement is None
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) < 1e-5


def test_divided_experts_and_phases(model: Model, usual: Placement) -> None:
    expected = floats(model)
    with model.override(
        backend="torch", placement=usual, stand_in={"cuda:0": StrictSeat("cuda:0")}
    ):
        found = run(model)
        bank = placed_bank(model, 2)
        assert bank.placement == "cuda:0 22, cpu 42"
        assert len(bank.residents["cuda:0"]) == len(set(range(0, 64, 3)) | set(range(0, 64, 2)))
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) < 1e-5


def test_bf16_stays_within_its_rounding(model: Model, usual: Placement) -> None:
    expected = floats(model)
    moved = model.place(usual, stand_in={"cuda:0": "cpu"})
    assert moved.loaded_bytes["cuda:0"] > 1e6 and "parts moved" in str(moved)
    for a, b in zip(run(model), expected, strict=True):
        assert error(a, b) < 0.03
    text = ktlab.domain_texts()["english"][:2000]
    here = dict(placement=Placement.everywhere(model.config, "cpu"))
    found = ktlab.compare(model, text, a=here, b={}, speed=False)
    assert not found.quality.identical and 0 < found.quality.kl_mean.value < 3e-3
    assert "placed on cpu + cuda:0" in str(model.settings) and found.b["placement"]["devices"]


def test_only_what_changed_moves(model: Model, usual: Placement) -> None:
    seat = StrictSeat("cuda:0")
    model.place(usual, stand_in={"cuda:0": seat})
    kept = model.layers[1].attention
    matrices = placed_bank(model, 3).residents["cuda:0"]
    nothing = model.place(usual, stand_in={"cuda:0": seat})
    assert nothing.parts == 0 and not nothing.loaded_bytes
    more = usual.put("experts", "cuda:0", layers=[3], experts=[1])
    moved = model.place(more)
    assert moved.parts == 1
    one = placed_bank(model, 3)
    assert moved.loaded_bytes["cuda:0"] == 4 * 3 * one.width * one.hidden_size
    assert model.layers[1].attention is kept
    assert one.residents["cuda:0"][0] is matrices[0]
    del kept, matrices, one
    back = model.place(Placement.everywhere(model.config, "cpu"))
    assert back.freed_bytes["cuda:0"] > 0 and not seat.here_bytes, "nothing is left there"
    assert all(block.seats is None for block in model.layers)
    assert type(model.layers[3].experts) is type(ktlab.load("tiny").layers[3].experts)


def stages(model: Model) -> dict[tuple[int, str], int]:
    """What stands where, by identity."""
    return {(b.index, name): id(stage) for b in model.layers for name, stage in vars(b).items()}


def test_an_override_moves_the_difference_and_gives_the_same_parts_back(
    model: Model, usual: Placement
) -> None:
    seat = StrictSeat("cuda:0")
    model.place(usual, stand_in={"cuda:0": seat})
    before = stages(model)
    held, one = dict(seat.here_bytes), placed_bank(model, 3)
    with model.override(placement=usual.put("experts", "cuda:0", layers=[3], experts=[1])):
        more = seat.here_bytes["weights"] - held["weights"]
        assert more == 4 * 3 * one.width * one.hidden_size, "one expert, in float32"
        with model.override(placement=Placement.everywhere(model.config, "cpu")):
            assert model.layers[2].seats is None
    assert seat.here_bytes == held
    assert stages(model) == before


def test_a_cache_moves_with_attention(model: Model, cpu: Placement) -> None:
    cache = model.new_cache(context=64)
    prompt = model.forward(IDS, cache)
    expected = model.forward(IDS[:1], cache)
    cache.truncate(len(IDS))
    moved = cpu.put("attention", "cuda:0", layers=[0, 2, 3])
    with model.override(placement=moved, stand_in={"cuda:0": StrictSeat("cuda:0")}):
        assert error(model.forward(IDS[:1], cache), expected) < 0.02
        assert [layer.seat.word for layer in cache.layers[:4]] == [
            "cuda:0",
            "cpu",
            "cuda:0",
            "cuda:0",
        ]
    cache.truncate(len(IDS))
    assert error(model.forward(IDS[:1], cache), expected) < 0.02
    assert cache.layers[0].seat.host and prompt.shape[0] == len(IDS)


def test_switches_stay_live(model: Model, usual: Placement) -> None:
    with model.override(backend="torch", top_k=6, attention="naive", quantize="q4_0", deferred=2):
        expected = run(model)
    model.place(usual, stand_in={"cuda:0": StrictSeat("cuda:0")})
    with model.override(backend="torch", top_k=6, attention="naive", quantize="q4_0", deferred=2):
        found = run(model)
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) < 1e-5
    with model.override(force={2: [5]}, mask={3: [0, 1]}):
        trace = model.trace(IDS, names=["layers.*.router.ids", "layers.1.attention.output"])
    assert bool((trace["layers.2.router.ids"] == 5).any(-1).all())
    twin = model.clone()
    assert error(run(twin)[0], run(model)[0]) == 0


def test_batches_and_chunks(model: Model, usual: Placement) -> None:
    ids = torch.stack([IDS, IDS.flip(0)])
    with model.override(backend="torch"):
        expected = model.forward(ids, chunk=16)
        with model.override(placement=usual, stand_in={"cuda:0": StrictSeat("cuda:0")}):
            assert error(model.forward(ids, chunk=16), expected) < 1e-5


def test_two_devices_and_a_router_apart(model: Model, cpu: Placement) -> None:
    placed = cpu.put("attention", "cuda:0").put("attention", "cuda:1", layers=[2, 3])
    placed = placed.put("router", "cuda:1", layers=[4]).put("shared", "cuda:1")
    placed = placed.put("experts", "cuda:0", experts=[1, 2]).put(
        "experts", "cuda:1", experts=[3, 4]
    )
    placed = placed.put("dense", "cuda:1", phase="prefill")
    stand_in = {word: StrictSeat(word) for word in ("cuda:0", "cuda:1")}
    expected = floats(model)
    with model.override(backend="torch", placement=placed, stand_in=stand_in):
        for a, b in zip(run(model), expected, strict=True):
            assert error(a, b) < 1e-5


def test_shared_experts_elsewhere_get_their_input_before_routed_ones_start(
    model: Model, cpu: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind them it would come when they are done."""
    said: list[str] = []

    class Telling(StrictSeat):
        def take(self, values: torch.Tensor) -> torch.Tensor:
            said.append(self.word)
            return super().take(values)

    def start(*args: Any, **words: Any) -> Running:
        said.append("experts")
        return start_experts(*args, **words)

    start_experts = placed_block.start_experts
    monkeypatch.setattr(placed_block, "start_experts", start)
    placed = cpu.put("attention", "cuda:0").put("router", "cuda:0").put("shared", "cuda:1")
    model.place(placed, stand_in={"cuda:0": "cpu", "cuda:1": Telling("cuda:1")})
    model.forward(IDS)
    assert said == ["cuda:1", "experts"] * len(model.moe_blocks)


def test_only_what_is_wanted_comes_back(model: Model, usual: Placement) -> None:
    seat = StrictSeat("cuda:0")
    model.place(usual, stand_in={"cuda:0": seat})

    def given(one: Model, **words: Any) -> int:
        before = seat.given_bytes
        one.forward(IDS, **words)
        return seat.given_bytes - before

    alone = given(model)
    assert given(interruptible(model, threading.Event())) == alone
    ids = Recorder(("layers.2.router.ids",))
    assert given(model, probe=ids) == alone + ids.joined()["layers.2.router.ids"].nbytes
    assert "layers.3.attention.output" in ids.seen


def test_positions_keep_no_device(model: Model, usual: Placement, cpu: Placement) -> None:
    model.place(usual, stand_in={"cuda:0": "cpu"})
    model.forward(IDS)
    seat = weakref.ref(model.seats["cuda:0"])
    model.place(cpu)
    gc.collect()
    assert seat() is None


def test_disk_and_a_node(model: Model, cpu: Placement) -> None:
    placed = cpu.put("experts", "disk", experts=range(10)).put(
        "experts", "numa:0", experts=range(10, 40)
    )
    expected = run(model)
    with model.override(placement=placed):
        part = placed_bank(model, 2).nodes["numa:0"]
        assert len(part.ids) == 30 and part.kernel.numa == 0
        assert part.nbytes > 0
        for a, b in zip(run(model), expected, strict=True):
            assert error(a, b) < 0.02


# What goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "full", "told"),
    [
        ("f32", torch.OutOfMemoryError, "ran out of memory"),
        ("int4", torch.OutOfMemoryError, "ran out of memory"),
        ("f32", torch.AcceleratorError, "failed"),
    ],
)
def test_out_of_memory_leaves_the_model_whole(
    model: Model, usual: Placement, dtype: str, full: type[Exception], told: str
) -> None:
    expected = run(model)
    before = {name: id(stage) for name, stage in vars(model.layers[2]).items()}
    seat = StrictSeat("cuda:0", dtype, room=2_000_000)
    seat.full = full
    with pytest.raises(PlacementError, match=rf"cuda:0 {told} at layers\.\d\.\w+.*nothing"):
        model.place(usual, stand_in={"cuda:0": seat})
    assert {name: id(stage) for name, stage in vars(model.layers[2]).items()} == before
    assert model.placement is None and not model.seats
    assert not seat.here_bytes, "what had been loaded is gone"
    assert torch.equal(run(model)[0], expected[0])
    # Half way from one placement to another, too.
    small = Placement.everywhere(model.config, "cpu").put("shared", "cuda:0")
    model.place(small, stand_in={"cuda:0": seat})
    shared = model.layers[2].shared
    with pytest.raises(PlacementError, match=told):
        model.place(usual, stand_in={"cuda:0": seat})
    assert model.layers[2].shared is shared and model.placement is small


def test_an_error_that_is_kept_keeps_nothing_on_another_device(
    model: Model, cpu: Placement
) -> None:
    """A frame of where it was raised holds the first device's experts of the layer."""
    roomy, full = StrictSeat("cuda:0"), StrictSeat("cuda:1", room=0)
    placed = cpu.put("experts", "cuda:0", experts=[0]).put("experts", "cuda:1", experts=[1, 2])
    with pytest.raises(PlacementError, match="ran out of memory") as kept:
        model.place(placed, stand_in={"cuda:0": roomy, "cuda:1": full})
    gc.collect()
    assert not roomy.here_bytes and kept.value.__cause__ is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_and_no_stand_in(model: Model, usual: Placement) -> None:
    with pytest.raises(PlacementError) as error:
        model.place(usual)
    assert "cuda:0 is not there" in str(error.value)
    assert "torch finds no CUDA device here" in str(error.value)
    assert 'stand_in={"cuda:0": "cpu"}' in str(error.value)


def test_what_cannot_be_run_is_said_at_once(model: Model, cpu: Placement) -> None:
    bad = cpu.put("output", "cuda:0", phase="decode").put("norms", "cuda:0", layers=[1])
    with pytest.raises(PlacementError) as error:
        model.place(bad, stand_in={"cuda:0": "cpu"})
    assert "output is on one device in prefill and on another" in str(error.value)
    assert "norms of layer 1 are computed where attention is" in str(error.value)
    with pytest.raises(SettingError, match="give placement or rules, too"):
        model.set(stand_in={"cuda:0": "cpu"})
    with pytest.raises(SettingError, match="dtype 'int3'"):
        model.place(cpu.put("shared", "cuda:0"), stand_in={"cuda:0": "cpu"}, dtype="int3")
    assert model.placement is None


def test_a_matrix_and_back(loaded: Model) -> None:
    linear = loaded.layers[1].attention.linears["output"]
    there = DeviceLinear(linear, StrictSeat("cuda:0", "bf16"))
    assert "bf16 on cuda:0" in repr(there) and there.device_bytes == 2 * linear.stack.size
    assert there.quantized("q4_0").stack.format.name == "q4_0"
    back = there.on_host()
    assert type(back) is type(linear) and back.stacks is linear.stacks
    assert not hasattr(back, "seat") or back is not there


def test_overlap_is_measured(
    model: Model, usual: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.place(usual, stand_in={"cuda:0": "cpu"})
    with model.watch_overlap() as found:
        model.forward(IDS)
    assert found.calls == len(model.moe_blocks) and found.host_s > 0 and found.device_s > 0
    assert found.share is not None and 0 <= found.share <= 1
    calls = found.calls
    with monkeypatch.context() as patch:  # marks cost time
        patch.delattr(TorchSeat, "mark")
        model.forward(IDS)
    assert found.calls == calls, "only inside of the with"
    with model.override(deferred=2), model.watch_overlap() as found:
        model.forward(IDS)
    assert found.calls == calls, "deferred experts run beside the next layer, too"


def test_devices_overlap_each_other() -> None:
    overlap = Overlap(on=True)
    running = Running(like=torch.zeros(1), here=HOST, begun=0.0, overlap=overlap)
    for word, seconds in (("cuda:0", [1.0, 2.0]), ("cuda:1", [2.5])):
        seat = TorchSeat(word, "cpu")
        running.marks += [(seat, 0.0, length) for length in seconds]
    running.on_host.append(lambda: (torch.zeros(1), 2.0))
    running.finish()
    assert overlap.calls == 1 and overlap.device_s == 3.0


def test_explain_says_who_computes(model: Model, usual: Placement) -> None:
    model.place(usual, stand_in={"cuda:0": "cpu"})
    assert "placed on cuda:0, computed on the cpu in its stead" in repr(model.experts.explain())
    linear = model.layers[1].attention.linears["output"]
    assert linear.explain().chosen.backend == "torch"


class Full(StrictSeat):
    free_bytes = 1_000_000


def test_too_little_room_is_said_before_anything_is_moved(model: Model, usual: Placement) -> None:
    seat = Full("cuda:0")
    with pytest.raises(PlacementError, match=r"cuda:0 would get .* free: .* too little; nothing"):
        model.place(usual, stand_in={"cuda:0": seat})
    assert not seat.here_bytes and model.placement is None
    roomy = StrictSeat("cuda:0")
    counted = needed_bytes(model, usual, {"cuda:0": roomy})["cuda:0"]
    moved = model.place(usual, stand_in={"cuda:0": roomy})
    assert moved.loaded_bytes["cuda:0"] == pytest.approx(counted, rel=0.01)
    assert needed_bytes(model, usual, {"cuda:0": roomy})["cuda:0"] == 0


def test_routers_need_room(model: Model, cpu: Placement) -> None:
    routers, seat = cpu.put("router", "cuda:0"), StrictSeat("cuda:0", "bf16")
    counted = needed_bytes(model, routers, {"cuda:0": seat})["cuda:0"]
    moved = model.place(routers, stand_in={"cuda:0": seat})
    assert moved.loaded_bytes["cuda:0"] == pytest.approx(counted, rel=0.01)
    assert needed_bytes(model, routers, {"cuda:0": seat})["cuda:0"] == 0


def test_a_cache_needs_room_on_each_device(
    model: Model, cpu: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.place(
        cpu.put("attention", "cuda:0", layers=[1]), stand_in={"cuda:0": StrictSeat("cuda:0")}
    )
    monkeypatch.setattr(StrictSeat, "free_bytes", 1000)
    with pytest.raises(ContextError, match="needs .* 1000 B of cuda:0 are available; ask for a sh"):
        model.new_cache(context=64)


def test_undoing_an_older_switch_leaves_stages_where_they_fit(
    model: Model, usual: Placement
) -> None:
    expected = floats(model)
    with model.override(quantize={"experts": "q4_0", "attention": "q4_0"}):
        model.place(usual, stand_in={"cuda:0": StrictSeat("cuda:0")})
    with model.override(backend="torch"):  # experts and attention are back on the host
        for a, b in zip(run(model), expected, strict=True):
            assert error(a, b) < 1e-5
    model.place(usual)
    assert placed_bank(model, 2).residents and not model.layers[1].attention.seat.host


def test_four_bits(model: Model, usual: Placement) -> None:
    components = ("attention", "dense", "shared", "output", "experts")
    wanted = usual.put("experts", "cuda:0")
    seat = StrictSeat("cuda:0", "int4")
    with model.override(backend="torch", quantize=dict.fromkeys(components, "int4_group128")):
        expected = run(model)
    model.place(wanted, stand_in={"cuda:0": seat})
    for a, b in zip(run(model), expected, strict=True):
        assert error(a, b) < 0.1  # one matrix a head has 16 bits here
    linear = model.layers[1].attention.linears["output"]
    assert isinstance(linear, DeviceLinear)
    alone = linear.on_host().quantized("int4_group128").weight_OI
    there = dense(linear.values).as_subclass(torch.Tensor).float()
    assert float((there - alone).abs().max()) < 0.005 * float(alone.abs().max())
    plan = ktlab.plan("tiny", placement=wanted)
    planned = sum(
        r.bytes for r in plan.rows if r.device == "cuda:0" and r.part.component != "cache"
    )
    # A zero beside each scale, which the plan (KTransformers' 4 bits) has not.
    assert 1.02 * planned < seat.here_bytes["weights"] < 1.06 * planned


def test_a_plan_is_loaded_in_the_formats_that_it_counts(model: Model) -> None:
    plan = ktlab.plan("tiny", placement=Placement.everywhere(model.config, "cpu").put(
        "shared", "cuda:0"))  # fmt: skip
    model.place(plan, stand_in={"cuda:0": "cpu"})
    assert model.seats["cuda:0"].format == "int4"
    # What is there keeps its format; a plan's and a word's count more.
    model.place(plan.placement.put("dense", "cuda:0"))
    assert model.seats["cuda:0"].format == "int4"
    whole = plan.placement.put("attention", "cuda:0").put("router", "cuda:0")
    for format in ("f32", "bf16", "f16"):  # whatever caches and routers are in
        model.place(ktlab.plan("tiny", placement=whole, gpu_formats=format))
        assert model.seats["cuda:0"].format == format
    with model.override(placement=plan, dtype="f32"):
        assert model.seats["cuda:0"].format == "f32"
        assert model.place(plan.placement).parts == 0
        assert model.place(plan.placement, dtype="bf16").parts > 0
    assert model.seats["cuda:0"].format == "f16"
    with pytest.raises(PlacementError, match="plan counts q8_0 on cuda:0, where .* say dtype="):
        model.place(ktlab.plan("tiny", placement=plan.placement, gpu_formats="q8_0"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(placement="gpu"), "placement is a str; expected a Placement, a Plan or a RuleSet"),
        (dict(stand_in={"cuda:0": "nonsense"}), "torch device 'nonsense': Expected one of cpu"),
        (dict(stand_in={"cuda:0": "cuda:99"}), "device 'cuda:99'; torch finds .* can stand in"),
    ],
)
def test_what_is_no_placement_or_no_device(
    arguments: dict[str, Any], message: str, model: Model, usual: Placement
) -> None:
    with pytest.raises(PlacementError, match=message):
        model.place(**({"placement": usual} | arguments))
    assert model.placement is None and not model.seats


def test_words_of_a_placement_want_one(model: Model) -> None:
    with pytest.raises(SettingError, match="stand_in and dtype say .* give placement or rules"):
        model.set(dtype="int4")
    with pytest.raises(SettingError, match="nodes says how a placement is computed"):
        model.set(nodes="copy")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
def test_on_a_gpu(model: Model, usual: Placement) -> None:
    expected = floats(model)
    model.place(usual)
    for a, b in zip(run(model), expected, strict=True):
        assert error(a, b) < 0.03
    there = model.ledger()["cuda:0"]
    assert there.total is not None and 0.99 * there.known < there.total < there.known + 2**28
    long = torch.arange(3, 500)
    model.forward(long)  # what is made at first use, memory and kernels, is no overlap
    with model.watch_overlap() as found:
        for _ in range(5):
            model.forward(long)
    assert found.share is not None and found.share > 0.8
    model.place(usual, dtype="int4")
    for a, b in zip(run(model), expected, strict=True):
        assert error(a, b) < 0.3  # four bits
    model.place(Placement.everywhere(model.config, "cpu"))
    assert not model.seats
