"""Where rule files put a model: their device words as a placement."""

from dataclasses import replace

import pytest
import torch

from ktlab.checkpoint.facts import read_facts
from ktlab.checkpoint.synthesis import TINY_QWEN3MOE_CONFIG, TINY_TEST_CONFIG
from ktlab.errors import CheckpointError, PlacementError, RuleError
from ktlab.model.load import load
from ktlab.model.model import Model
from ktlab.model.shape_alone import shape_alone
from ktlab.placement.placement import Placement
from ktlab.placement.rules import Preview, RuleSet
from tests.placement.test_own import GATES, ByHand, Deaf, Near
from tests.placement.test_own import rules as own
from tests.placement.test_rule_files import EXPERTS, FIRST_RELEASE, GPU_AND_CPU, LINEAR, MODEL
from tests.placement.test_rules import BANKS, FAMILIES, IDS, checkpoint, one

pytestmark = pytest.mark.usefixtures("no_gpu")
DENSE_PART = ("attention", "router", "norms")
GPU = "generate_device: 'cuda:0', prefill_device: 'cuda:0'"


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(checkpoint(TINY_TEST_CONFIG))


def place(model: Model, text: str, **how) -> Placement:
    return RuleSet.parse(text).placement(model, **how)


def notes(model: Model, text: str) -> str:
    return "\n".join(RuleSet.parse(text).preview(model).notes)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.name)
def test_our_own_files(config) -> None:
    model = Model(checkpoint(config))
    cpu = Placement.everywhere(config)
    for name in ("cpu-experts", "amx-int8-experts", "torch-reference"):
        assert RuleSet.read(name).placement(model) == cpu
    hybrid = RuleSet.read("gpu-attention").placement(model)
    split = Placement.everywhere(config, "cuda:0").put("embedding", "cpu").put("experts", "cpu")
    assert hybrid == split
    hot = RuleSet.read("hot-experts").placement(model)
    assert hot == hybrid.put("experts", "cuda:0", experts=range(8))
    assert not RuleSet.read("hot-experts").preview(model).idle("matches nothing")
    for name in ("gpu-attention", "hot-experts"):
        RuleSet.read(name).apply(model).undo()  # what is not done here is told, not refused


def test_two_gpus_by_layers() -> None:
    config = replace(TINY_TEST_CONFIG, num_layers=34)
    rules, model = RuleSet.read("two-gpus"), Model(checkpoint(config))
    found = rules.placement(model)
    half = Placement.everywhere(config, "cuda:0").put("embedding", "cpu").put("experts", "cpu")
    for component in ("attention", "shared"):
        half = half.put(component, "cuda:1", layers=range(30, 34))
    assert found == half.put("output", "cuda:1")
    assert not rules.preview(model).idle("matches nothing")
    assert "attention 30-33" in rules.preview(model).places[-1]


def test_the_words_of_a_whole_file(model: Model) -> None:
    found = place(model, GPU_AND_CPU)
    for component in ("attention", "cache", "router", "norms"):
        assert found.device(component, layer=1) == "cuda:0", component
    assert found.device("norms") == found.device("output") == "cuda:1"
    assert "on cuda:1: norms are where their layer's attention is, on cuda:0" in notes(
        model, GPU_AND_CPU
    )
    assert found.device("embedding") == found.device("experts", layer=2) == "cpu"
    assert found.device("experts", layer=2, phase="prefill") == "cpu", "no prompt layer by layer"
    written = place(model, GPU_AND_CPU, as_written=True)
    assert written.device("experts", layer=2, phase="prefill") == "cuda:0"
    assert written.decode == found.decode and written.device("experts", layer=2) == "cpu"
    layerwise = GPU_AND_CPU.replace("threshold: 0", "threshold: 3000")
    assert place(model, layerwise) == written
    assert "prefill devices count for prompts of 3000 tokens and more" in notes(model, layerwise)
    assert "kv_b_proj on cuda:1: attention is placed as a whole, on cuda:0" in notes(
        model, GPU_AND_CPU
    )
    assert place(model, FIRST_RELEASE).device("experts", layer=1) == "cpu"
    preview = RuleSet.parse(GPU_AND_CPU).preview(model)
    assert preview.placement == found and Preview.from_json(preview.to_json()) == preview
    assert "places: cpu: embedding, experts 1-2" in preview.summary


def test_what_no_rule_matches(model: Model) -> None:
    bank = one(BANKS, EXPERTS, "generate_device: cuda")
    assert place(model, bank) == Placement.everywhere(model.config, "cuda:0"), "as in KTransformers"
    some = Placement.everywhere(model.config, "cpu").put("experts", "cuda:0")
    assert place(model, bank, default="cpu") == some
    assert place(model, one(BANKS, EXPERTS, "generate_device: cpu")).devices == ("cpu",)
    moved = one("^model$", MODEL, "transfer_map: {2: 'cuda:3'}")
    assert place(model, moved).device("attention", layer=2) == "cuda:3"
    assert place(model, moved).device("attention", layer=1) == "cuda:0"


def test_below_a_rule_that_takes_all(model: Model) -> None:
    text = one("layers\\.1$", "default", "generate_device: 'cuda:2'", "  recursive: False\n")
    found = place(model, text + one(".", "default", "generate_device: cpu"))
    for component in (*DENSE_PART, "experts", "shared"):
        assert found.device(component, layer=1) == "cuda:2", component
        assert found.device(component, layer=2) == "cpu", component


def test_parts_of_a_component_apart(model: Model) -> None:
    text = one("o_proj$", LINEAR, GPU) + one(".", "default", "generate_device: cpu")
    assert place(model, text).devices == ("cpu",)
    assert notes(model, text) == (
        "model.layers.0-2.self_attn.o_proj on cuda:0: attention is placed as a whole, on cpu"
    )
    text = text.replace("o_proj", "self_attn\\.(q|kv).*")
    assert place(model, text).device("attention", layer=0) == "cuda:0", "most of its weights"


def test_experts_one_by_one() -> None:
    model = Model(checkpoint(TINY_QWEN3MOE_CONFIG))
    text = one("layers\\.1\\.mlp\\.experts\\.(3|5)$", "default", GPU)
    found = place(model, text + one(".", "default", "generate_device: cpu"))
    assert found.experts(layer=1, device="cuda:0") == (3, 5)
    assert found.experts(layer=0, device="cuda:0") == ()


def test_other_makers(model: Model) -> None:
    text = one(".", "default", "generate_device: xpu") + one(BANKS, EXPERTS)
    with pytest.raises(RuleError, match="xpu: a placement knows cpu, numa:n, cuda:n and disk"):
        place(model, text)
    preview = RuleSet.parse(text).preview(model)
    assert preview.placement is None and "xpu" in preview.notes[0]


# Placed -------------------------------------------------------------------------------------------

STAND_IN = {"cuda:0": "cpu", "cuda:1": "cpu"}


def devices(model: Model) -> tuple[str, ...]:
    assert model.placement is not None
    found: tuple[str, ...] = model.placement.placement.devices
    return found


def test_rules_place_where_the_devices_are(model: Model) -> None:
    rules, before = RuleSet.read("hot-experts"), model.forward(IDS)
    assert {row.status for row in rules.preview(model).rows} >= {"not here"}
    with rules.applied(model):
        assert model.placement is None, "no such device: it stays where it is"
    preview = rules.preview(model, stand_in=STAND_IN)
    assert not preview.missing
    hot, *_ = preview.rows
    assert (hot.status, hot.change) == ("changes", "cpu -> cuda:0") and hot.count == 16
    attention = next(row for row in preview.rows if row.stage == "attention matrix")
    assert attention.change == "cpu -> cuda:0"
    cpu = next(row for row in preview.rows if row.stage == "embedding")
    assert cpu.status == "as it is"
    with rules.applied(model, stand_in=STAND_IN, strict=True):
        assert model.placement == rules.placement(model)
        # All tokens together: bf16 tips a router's near tie here and there.
        assert (model.forward(IDS) - before).norm() < 0.05 * before.norm()
        assert not torch.equal(model.forward(IDS), before), "in bfloat16 there"
        assert not rules.preview(model).changes, "there already; the stand-in is known"
        assert {row.change for row in RuleSet.read("cpu-experts").preview(model).changes}
        with RuleSet.read("cpu-experts").applied(model):
            assert devices(model) == ("cpu",)
            assert torch.equal(model.forward(IDS), before)
        assert model.placement == rules.placement(model)
    assert model.placement is None and torch.equal(model.forward(IDS), before)


MARLIN = """
- match: {name: lm_head}
  replace:
    class: ktransformers.operators.linear.KTransformersLinear
    kwargs: {generate_device: cuda, prefill_device: cuda, generate_op: KLinearMarlin,
             prefill_op: KLinearMarlin}
"""


def test_a_whole_file_on_stand_ins(model: Model) -> None:
    rules = RuleSet.parse(GPU_AND_CPU)
    with model.override(rules=rules, stand_in=STAND_IN):
        assert devices(model) == ("cpu", "cuda:0", "cuda:1")
    missing = rules.preview(model, stand_in=STAND_IN).missing
    assert not [what for what in missing if "cuda" in what]
    assert missing['KLinearMarlin\'s 4 bits: bf16 on a GPU here; 4 with dtype="int4"'] == (2,)
    with rules.applied(model, stand_in=STAND_IN):
        assert devices(model) == ("cpu", "cuda:0", "cuda:1")
        assert model.experts[0].format == "int8_channel" and model.forward(IDS).isfinite().all()
    marlin = RuleSet.parse(MARLIN)
    wish = 'KLinearMarlin\'s 4 bits: bf16 on a GPU here; 4 with dtype="int4"'
    assert list(marlin.preview(model, stand_in=STAND_IN).missing) == [wish]
    with pytest.raises(RuleError, match="KLinearMarlin's 4 bits"):
        marlin.apply(model, stand_in=STAND_IN, strict=True)
    with marlin.applied(model, stand_in=STAND_IN, strict=True, dtype="int4"):
        assert not marlin.preview(model).missing
    with rules.applied(model, stand_in=STAND_IN, dtype="int4"):
        assert {seat.format for seat in model.seats.values()} == {"int4"}
        assert model.forward(IDS).isfinite().all()
    one_only = rules.preview(model, stand_in={"cuda:0": "cpu"}).missing
    assert "asks for cuda:1 from layer 2 on; computed on the CPU" in one_only
    assert model.placement is None


def test_a_class_of_the_users_on_devices(model: Model) -> None:
    """Routers and attention go with it; experts of the user's are computed where they are."""
    near, hand = own(GATES, Near, "near: [3, 5]"), own(BANKS, ByHand)
    with RuleSet.read("gpu-attention").applied(model, stand_in=STAND_IN):
        expected = model.forward(IDS)
        with near.applied(model), hand.applied(model), own("self_attn$", Deaf).applied(model):
            assert devices(model) == ("cpu",), "what no rule names is on the CPU"
    before = model.forward(IDS)
    with near.applied(model), own("self_attn$", Deaf, "loudness: 1.0").applied(model):
        trace = model.trace(IDS)
        with model.override(placement=RuleSet.read("gpu-attention").placement(model),
                            stand_in=STAND_IN):  # fmt: skip
            assert isinstance(model.layers[1].router, Near)
            assert isinstance(model.layers[1].attention, Deaf)
            placed_trace = model.trace(IDS)
            loads = placed_trace.routing.histogram(layer=2).counts_E
            assert loads[3] == loads[5] == len(IDS)
        assert (trace["layers.1.router.ids"] == model.trace(IDS)["layers.1.router.ids"]).all()
    with hand.applied(model):
        with model.override(placement=RuleSet.read("gpu-attention").placement(model),
                            stand_in=STAND_IN):  # fmt: skip
            assert torch.allclose(model.forward(IDS), expected, atol=0.2)
        with pytest.raises(PlacementError, match="layers.1.experts is a ByHand of your own"):
            hot = RuleSet.read("hot-experts").placement(model)
            model.place(hot, stand_in=STAND_IN)
    with RuleSet.read("hot-experts").applied(model, stand_in=STAND_IN):
        with pytest.raises(RuleError, match="the experts here are on cuda:0 8, cpu 8, a class of"):
            hand.apply(model)
    assert torch.equal(model.forward(IDS), before)


def test_a_shape_without_weights(capsys: pytest.CaptureFixture[str]) -> None:
    from ktlab.cli import main

    v3 = shape_alone(read_facts("deepseek-v3", format="q4_k_m"))
    assert v3.nbytes > 400e9 and "q4_k" in v3.layers[3].experts.format
    with pytest.raises(CheckpointError, match="only its header was read, there are no weights"):
        v3.forward([1, 2])
    found = RuleSet.read("two-gpus").placement(v3)
    assert found.device("attention", layer=29) == "cuda:0" != found.device("attention", layer=30)
    tiny = read_facts("tiny")
    assert shape_alone(tiny).nbytes == load("tiny").nbytes
    assert main(["rules", "preview", "two-gpus", "deepseek-v3", "--format", "q4_k_m"]) == 0
    assert "cuda:1: attention 30-60" in capsys.readouterr().out
    plan = ["plan", "deepseek-v3", "--format", "q4_k_m", "--rules"]
    assert main([*plan, "two-gpus", "--as", "llama.cpp"]) == 0
    written = capsys.readouterr().out
    assert written.startswith("-ngl 999 -ts 30,32 --cpu-moe"), written
    assert main([*plan, "two-gpus", "-ngl", "3"]) == 2
    assert "--rules and -ngl both say what goes where" in capsys.readouterr().err
    assert main(["rules", "preview", "two-gpus", "tiny", "--format", "q4_0"]) == 2
    assert "--format is of a shape" in capsys.readouterr().err
