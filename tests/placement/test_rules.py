"""Rule files on models: what is matched, what the preview says, what is set and taken back."""

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from ktlab.checkpoint.checkpoint import Checkpoint
from ktlab.checkpoint.config import ModelConfig
from ktlab.checkpoint.synthesis import (
    TINY_OLMOE_CONFIG,
    TINY_QWEN3MOE_CONFIG,
    TINY_TEST_CONFIG,
    TINY_V2_CONFIG,
    TINY_YARN_CONFIG,
    synthesize,
)
from ktlab.errors import RuleError
from ktlab.kernels import native
from ktlab.memory import memory
from ktlab.model import copies
from ktlab.model.model import Model
from ktlab.placement.rules import Preview, RuleSet
from ktlab.placement.rules.modules import Module, modules
from ktlab.placement.rules.preview import collapsed
from tests.placement.test_rule_files import EXPERTS, FIRST_RELEASE, GPU_AND_CPU, LINEAR

pytestmark = pytest.mark.usefixtures("no_gpu")
IDS = torch.randint(0, 256, (40,), generator=torch.manual_seed(7))
FAMILIES = [TINY_TEST_CONFIG, TINY_V2_CONFIG, TINY_QWEN3MOE_CONFIG, TINY_OLMOE_CONFIG]
BANKS = "^model\\.layers\\.[0-9]+\\.mlp\\.experts$"
needs_native = pytest.mark.skipif(bool(native.unavailable()), reason="no C kernels here")


def checkpoint(config: ModelConfig) -> Checkpoint:
    return synthesize(config, seed=1, formats={"*_exps*": "q8_0", "*": "q8_0"})


@pytest.fixture(scope="module")
def model() -> Model:
    """Of the DeepSeek-V3 architecture: three layers, the first of them dense."""
    return Model(checkpoint(TINY_TEST_CONFIG))


def one(name: str, new: str, kwargs: str = "", rest: str = "", match: str = "") -> str:
    """A rule; `name` is a regular expression, `match` more words for it."""
    return (
        f"- match: {{name: '{name}'{match}}}\n"
        f"  replace: {{class: {new}, kwargs: {{{kwargs}}}}}\n{rest}"
    )


def preview(model: Model, text: str) -> Preview:
    return RuleSet.parse(text).preview(model)


def every(module: Module) -> Iterator[Module]:
    yield module
    for child in module.below():
        yield from every(child)


# What is matched ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.name)
def test_names_and_classes_are_those_of_transformers(config: ModelConfig) -> None:
    from tests.model.peer import transformers_model

    weights = synthesize(config)
    ours = {module.name: module for module in every(modules(Model(weights)))}
    seen = 0
    for name, theirs in transformers_model(weights).named_modules():
        kind = type(theirs).__name__
        if ".experts." in name or "rotary" in name or "Activation" in kind:
            continue  # stacked there, one for all layers, called by their function
        module = ours[name]
        dotted = f"{type(theirs).__module__}.{kind}"
        dotted = f"torch.nn.{kind}" if dotted.startswith("torch.nn.") else dotted
        assert kind == "SiLU" or module.is_a(dotted) and module.is_a("torch.nn.Module"), name
        seen += 1
    assert seen > 10 * config.num_layers


@pytest.mark.parametrize("version", ["V2", "V3"])
def test_both_deepseek_files_are_meant(model: Model, version: str) -> None:
    modeling = "modeling_deepseek" + ("_v3" if version == "V3" else "")
    text = (
        f"- match: {{class: ktransformers.models.{modeling}.Deepseek{version}MoE}}\n"
        f"  replace: {{class: ktransformers.operators.experts.KDeepseek{version}MoE}}\n"
    )
    (row,) = preview(model, text).rows
    assert (row.modules, row.status) == ("model.layers.1-2.mlp", "as it is")


def test_a_subclass_is_matched_too(model: Model) -> None:
    text = (
        "- match: {class: ktransformers.models.modeling_deepseek.DeepseekV2YarnRotaryEmbedding}\n"
        "  replace: {class: ktransformers.operators.RoPE.YarnRotaryEmbedding}\n"
    )
    yarn = Model(checkpoint(TINY_YARN_CONFIG))
    assert preview(yarn, text).rows[0].modules == "model.layers.0-2.self_attn.rotary_emb"
    (row,) = preview(model, text).rows
    assert row.status == "matches nothing" and "is a DeepseekV2YarnRotary" in row.note
    assert preview(yarn, text.replace("V2Yarn", "V2")).rows[0].count == 3
    whole = preview(model, "- match: {class: torch.nn.Module}\n  replace: {class: default}\n")
    assert sum(row.count for row in whole.rows) == len(list(every(modules(model))))


def test_the_first_match_counts(model: Model) -> None:
    last = one("self_attn", "default", "generate_device: cuda")
    text = one("layers\\.1\\.self_attn\\.o_proj$", LINEAR, "generate_op: KLinearTorch, "
               "generate_device: cpu") + last  # fmt: skip
    first, *rows = preview(model, text).rows
    assert (first.rule, first.modules) == (1, "model.layers.1.self_attn.o_proj")
    assert first.status == "changes" and first.after == "q8_0, torch"
    shadowed = rows.pop()
    assert (shadowed.status, shadowed.modules) == ("shadowed", first.modules)
    assert shadowed.note == "rule 1 comes first"
    assert not any("layers.1.self_attn.o_proj" in row.modules for row in rows)
    assert any("layers.0,2.self_attn.o_proj" in row.modules for row in rows)


def test_a_rule_that_is_not_recursive_keeps_what_lies_below(model: Model) -> None:
    linear = "- match: {class: torch.nn.Linear}\n" + (
        f"  replace: {{class: {LINEAR}, kwargs: {{generate_device: cpu}}}}\n"
    )
    bank = one(BANKS, EXPERTS, "backend: llamafile")
    open_, closed = (
        preview(model, bank + linear),
        preview(model, bank + "  recursive: False\n" + linear),
    )
    below = [row for row in open_.rows if "experts." in row.modules and row.stage == "one expert"]
    assert [row.modules for row in below] == [
        "model.layers.1-2.mlp.experts.0-15.{gate_proj,up_proj,down_proj}"
    ]
    assert "one bank here" in below[0].missing[0]
    assert len(closed.rows) == len(open_.rows) - 1
    unseen = preview(model, bank + "  recursive: False\n" + one("experts\\.3", "default"))
    assert unseen.rows[-1].status == "matches nothing"
    assert "model.layers.1.mlp.experts.3 lies below what rule 1 takes" in unseen.rows[-1].note


def test_rules_that_come_too_late(model: Model) -> None:
    found = preview(model, one("o_proj$", "default") + one("self_attn\\.o_proj$", "default"))
    assert found.late == (
        2,
    ) and "rule 2: comes too late, earlier ones take all of it" in "\n".join(found.summary)
    assert not preview(model, GPU_AND_CPU).late


def test_rules_that_match_nothing_say_why(model: Model) -> None:
    text = one("^model\\.layers\\.9\\.", "default") + one(
        "mlp$", "default", match=", class: torch.nn.Linear"
    )
    text += "- match: {class: ktransformers.models.modeling_mixtral.MixtralMLP}\n"
    notes = [row.note for row in preview(model, text + "  replace: {class: default}\n").rows]
    assert notes == [
        "no module here has such a name",
        "3 modules here have such a name, none of them is a Linear",
        "no module here is a MixtralMLP",
    ]


def test_collapsed_names() -> None:
    names = [f"model.layers.{i}.mlp.{m}" for m in ("gate", "experts") for i in (1, 2, 3, 7)]
    assert collapsed(names) == "model.layers.1-3,7.mlp.{gate,experts}"
    assert collapsed(["model.layers.0", "model.layers.1"]) == "model.layers.0-1"
    assert collapsed(["lm_head", "model"]) == "{lm_head,model}"
    assert collapsed([]) == ""


# What the preview says ----------------------------------------------------------------------------


def test_the_preview_of_a_whole_file(model: Model) -> None:
    found = preview(model, GPU_AND_CPU)
    lines = repr(found).splitlines()
    assert lines[0] == "rules: 8 rules on tiny-test"
    assert max(map(len, lines)) <= 80
    experts = next(row for row in found.rows if row.stage == "experts")
    assert experts.modules == "model.layers.1-2.mlp.experts" and experts.status == "changes"
    assert experts.before.startswith("q8_0, ") and experts.after.startswith("int8_channel, ")
    assert "a layer become" in experts.note
    assert f"experts, changes: {experts.change}" in " ".join(repr(found).split())
    assert found.missing["asks for cuda:1 from layer 2 on; computed on the CPU"] == (6,)
    assert found.missing["asks for cuda for prefill; computed on the CPU"] == (4,)
    assert 2 in found.missing["asks for cuda; computed on the CPU"]
    summary = "\n".join(found.summary)
    assert f"experts: {experts.change} (model.layers.1-2.mlp.experts)" in summary
    assert "rule 6: asks for cuda:1 from layer 2 on" in summary
    frame = found.to_frame()
    assert len(frame) == len(found.rows) and set(frame.status) >= {
        "changes",
        "not here",
        "shadowed",
    }
    page = found._repr_html_()
    assert "model.layers.1-2.mlp.experts" in page and "→" in page and "<script" not in page
    assert found._repr_mimebundle_()["text/plain"] == repr(found)
    assert Preview.from_json(found.to_json()) == found


KT = "ktransformers.operators"
V2 = "class: ktransformers.models.modeling_deepseek.DeepseekV2"
V3_ = "class: ktransformers.models.modeling_deepseek_v3.DeepseekV3"
NORMS = (
    "model.layers.0-2.self_attn.{q_a_layernorm,kv_a_layernorm}, "
    "model.layers.0-2.{input_layernorm,post_attention_layernorm}, model.norm"
)
CPU = "generate_device: cpu"


@pytest.mark.parametrize(
    ("match", "new", "kwargs", "modules", "what"),
    [
        (f"{V3_}Attention", "attention.KDeepseekV3Attention", CPU,
         "model.layers.0-2.self_attn", "absorbed already"),
        (f"{V2}Attention", "attention.DeepseekV2AttentionInjected", "absorb_for_prefill: False",
         "model.layers.0-2.self_attn", "absorbed already"),
        ("name: 'self_attn$'", "balance_serve_attention.flashinfer_attn", CPU,
         "model.layers.0-2.self_attn", "absorbed already"),
        (f"{V2}Model", "layer_wise_prefill.KDeepseekV2Model",
         "per_layer_prefill_intput_threshold: 0", "model", "configuration says"),
        (f"{V3_}YarnRotaryEmbedding", "RoPE.YarnRotaryEmbeddingV3", CPU,
         "model.layers.0-2.self_attn.rotary_emb", "configuration says"),
        (f"{V3_}MoE", "experts.KDeepseekV3MoEV2", CPU, "model.layers.1-2.mlp",
         "configuration says"),
        (f"{V3_}MLP", "mlp.kDeepseekV3MLP", CPU, "model.layers.1-2.mlp.shared_experts",
         "configuration says"),
        (f"{V2}RMSNorm", "layernorm.RMSNorm", CPU, NORMS, "configuration says"),
        (f"name: '{BANKS}'", "experts.KTransformersExpertsV2", "backend: AMXInt4",
         "model.layers.1-2.mlp.experts", "-> int4_group"),
        (f"name: '{BANKS}'", "experts.KTransformersExpertsV2", "backend: AMXBF16",
         "model.layers.1-2.mlp.experts", "-> bf16"),
        ("name: '^lm_head'", "linear.KTransformersLinear",
         f"{CPU}, generate_op: VLinearMarlin", "lm_head", "VLinearMarlin runs on a GPU alone"),
        ("name: '^lm_head'", "linear.KTransformersLinear",
         f"{CPU}, generate_op: KLinearCPUInfer", "lm_head", "q8_0, "),
        ("name: '^lm_head'", "linear.KTransformersLinear",
         f"{CPU}, generate_op: KLinearCPUInfer, prefill_device: cuda, prefill_op: VLinearMarlin",
         "lm_head", "asks for cuda for prefill; computed on the CPU"),
    ],
)  # fmt: skip
def test_words_of_ktransformers_files(
    match: str, new: str, kwargs: str, modules: str, what: str
) -> None:
    """They are read, find their modules, and say what becomes of them; applied, they compute."""
    yarn = Model(checkpoint(TINY_YARN_CONFIG))
    text = f"- match: {{{match}}}\n  replace: {{class: {KT}.{new}, kwargs: {{{kwargs}}}}}\n"
    rules = RuleSet.parse(text)
    row = next(row for row in rules.preview(yarn).rows if row.modules == modules)
    assert what in row.what and row.status != "matches nothing"
    with rules.applied(yarn):
        assert yarn.forward(IDS).isfinite().all()


@pytest.mark.parametrize("as_written", [False, True])
def test_the_output_on_the_cpu_for_decode_and_on_the_gpu_for_prompts(
    model: Model, as_written: bool
) -> None:
    """As KTransformers' files have lm_head; without a threshold their prompts stay with decode."""
    text = one("^lm_head", LINEAR, "generate_device: cpu, generate_op: KLinearCPUInfer, "
               "prefill_device: cuda, prefill_op: KLinearMarlin")  # fmt: skip
    found = RuleSet.parse(text).placement(model, as_written=as_written)
    assert found.device("output", phase="decode") == "cpu"
    assert found.device("output", phase="prefill") == ("cuda:0" if as_written else "cpu")


def test_a_preview_changes_nothing(model: Model) -> None:
    before, settings = model.forward(IDS), model.settings
    for text in (GPU_AND_CPU, FIRST_RELEASE):
        preview(model, text)
    assert model.settings == settings and torch.equal(model.forward(IDS), before)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.name)
def test_our_own_files_on_every_family(config: ModelConfig) -> None:
    model = Model(checkpoint(config))
    for name in ("cpu-experts", "amx-int8-experts", "torch-reference"):
        found = RuleSet.read(name).preview(model)
        assert not found.idle("matches nothing") and not found.idle("shadowed")
        with RuleSet.read(name).applied(model):
            assert model.forward(IDS).isfinite().all()
            assert not RuleSet.read(name).preview(model).changes, "done already"


def test_what_has_no_counterpart_is_told(model: Model) -> None:
    text = one(BANKS, EXPERTS, "n_deferred_experts: [6, 8]", "  recursive: False\n")
    text += one("gate$", "ktransformers.operators.gate.KMoEGateGreedy")
    text += one("o_proj$", LINEAR, "num_bits: 4, generate_device: cpu")
    text += one("self_attn$", EXPERTS)
    text += one("q_b_proj$", LINEAR, "generate_op: KLinearQ8, generate_device: cpu")
    text += one("^model$", "ktransformers.operators.models.KDeepseekV2Model",
                "per_layer_prefill_intput_threshold: 100")  # fmt: skip
    told = "\n".join(preview(model, text).missing)
    for words in (
        "deferred by the number of tokens, [6, 8]; here 6 for any number",
        "6 deferred experts: a token has 4; none is deferred",
        "KMoEGateGreedy chooses in its own way", "num_bits 4",
        "KLinearMarlin runs on a GPU alone", "KTransformersExperts stands for a layer's routed "
        "experts, this is: attention", "KLinearQ8's 8 bits", "layer by layer; prompts pass",
    ):  # fmt: skip
        assert words in told
    grouped = preview(Model(checkpoint(TINY_QWEN3MOE_CONFIG)), GPU_AND_CPU)
    assert any("GQA has no latent" in what for what in grouped.missing)


def test_without_amx_the_experts_are_computed_by_what_there_is(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.unavailable():
        pytest.skip("no C kernels here")
    real = native.reject

    def reject(isa: str, formats: tuple[str, ...]) -> str:
        return f"this processor has no {isa}" if isa.startswith("amx") else real(isa, formats)

    monkeypatch.setattr(native, "reject", reject)
    rules = RuleSet.read("amx-int8-experts")
    (row,) = rules.preview(model).rows
    assert row.missing[0].startswith(
        "AMXInt8 asks for amx_int8: this processor has no amx_int8; computed by native a"
    )
    with rules.applied(model):
        assert model.experts[0].format == "int8_channel" and "amx" not in model.experts[0].isa


def test_without_compiled_kernels(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable", lambda: "not built")
    monkeypatch.setattr(native, "formats", lambda: ())
    bare = Model(checkpoint(TINY_TEST_CONFIG))
    row = RuleSet.read("cpu-experts").preview(bare).rows[0]
    assert row.missing == ("llamafile asks for compiled code: not built; computed by numba",)
    assert row.status == "not here"


def test_strict_refuses_what_is_not_done(model: Model) -> None:
    settings, rules = model.settings, RuleSet.parse(GPU_AND_CPU, "both.yaml")
    with pytest.raises(RuleError, match="both.yaml asks for what is not done .* on tiny-test") as e:
        rules.apply(model, strict=True)
    assert "rule 6: asks for cuda:1 from layer 2 on; computed on the CPU" in str(e.value)
    with pytest.raises(RuleError), rules.applied(model, strict=True):
        pass
    assert model.settings == settings
    RuleSet.read("torch-reference").apply(model, strict=True).undo()


def test_deferred_experts(model: Model) -> None:
    text = one(BANKS, EXPERTS, "n_deferred_experts: 2", "  recursive: False\n")
    first, last = preview(model, text).rows
    assert first.change.endswith("0 deferred -> 2 deferred") and "prompts" in first.note
    assert (last.modules, last.status) == ("model.layers.2.mlp.experts", "as it is")
    with model.override(deferred=2):
        expected = model.forward(IDS)
        assert not preview(model, text).changes
    with RuleSet.parse(text).applied(model):
        assert model.settings.deferred == {1: 2} and torch.equal(model.forward(IDS), expected)
    assert not model.settings.deferred


# What is set --------------------------------------------------------------------------------------


@needs_native
def test_applied_is_what_the_same_switches_give(model: Model) -> None:
    isa = "auto" if native.reject("amx_int8", ["int8_channel"]) else "amx_int8"
    by_hand = {"backend": {"experts": "native"}, "isa": {"experts": isa}}
    before, settings = model.forward(IDS), model.settings
    with model.override(format="int8_channel", **by_hand):
        expected, same = model.forward(IDS), model.settings
    with model.override(attention="naive"):  # the file asks for the absorbed form
        with RuleSet.parse(GPU_AND_CPU).applied(model) as changed:
            assert changed is model and model.settings == same
            assert torch.equal(model.forward(IDS), expected)
        assert model.settings.attention[0] == "naive"
    assert not torch.equal(expected, before)
    assert model.settings == settings and torch.equal(model.forward(IDS), before)


def test_a_rule_for_one_layer_and_one_for_one_matrix(model: Model) -> None:
    text = one("^model\\.layers\\.2\\.mlp\\.experts$", EXPERTS, "generate_op: KExpertsTorch")
    text += one("layers\\.0\\.self_attn\\.(kv_b|o)_proj", LINEAR,
                "generate_device: cpu, generate_op: KLinearTorch")  # fmt: skip
    change = RuleSet.parse(text).apply(model)
    try:
        with model.clone().override() as twin:
            assert [bank.backend for bank in twin.experts] == ["auto", "torch"]
        matrices = model.layers[0].attention.linears
        asked = {name for name, linear in matrices.items() if linear.backend == "torch"}
        assert asked == {"k_b", "v_b", "output"}
        assert all(m.backend == "auto" for m in model.layers[1].attention.linears.values())
        rules = RuleSet.parse(text)
        assert not rules.preview(model).changes
    finally:
        change.undo()
    assert {m.backend for m in model.layers[0].attention.linears.values()} == {"auto"}


def test_operators_of_a_gpu_leave_the_cpu_as_it_is(model: Model) -> None:
    """A torch operator on cuda is no wish for float32 copies on the CPU."""
    text = one("_proj$", LINEAR, "generate_device: cuda, generate_op: KLinearTorch")
    text += one(BANKS, EXPERTS, "generate_device: 'cuda:0', generate_op: KExpertsMarlin")
    found = preview(model, text)
    assert not found.changes
    assert set(found.missing) >= {"asks for cuda for decode; computed on the CPU"}


def test_what_fails_half_way_is_undone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    before, settings = model.forward(IDS), model.settings
    requantized = model.requantized

    def failing(stage, format):
        if stage.layer == 2:
            raise MemoryError("no room")
        return requantized(stage, format)

    monkeypatch.setattr(model, "requantized", failing)
    with pytest.raises(MemoryError):
        RuleSet.read("amx-int8-experts").apply(model)
    assert model.settings == settings and torch.equal(model.forward(IDS), before)
    with pytest.raises(ZeroDivisionError), RuleSet.read("torch-reference").applied(model):
        raise ZeroDivisionError
    assert model.settings == settings


def test_experts_that_do_not_fit_in_memory_are_refused_before(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules, settings = RuleSet.read("amx-int8-experts"), model.settings
    for bank in model.experts:
        bank._requantized.clear()
    needed = rules.preview(model).new_bytes
    assert any("other formats take" in line for line in rules.preview(model).summary)
    for bytes_, fits in ((needed - 1024, False), (needed, True)):
        monkeypatch.setattr(copies, "memory", lambda n=bytes_: replace(memory(), available=n))
        if fits:
            rules.apply(model).undo()
        else:
            with pytest.raises(RuleError, match="1.0 KiB more than is free beside the model"):
                rules.apply(model)
        assert model.settings == settings
    assert needed == sum(bank.quantized("int8_channel").nbytes for bank in model.experts)
    assert rules.preview(model).new_bytes == 0, "kept, so that taking them again costs nothing"


def test_progress_in_bytes(model: Model) -> None:
    seen: list[tuple[float, float]] = []
    RuleSet.read("amx-int8-experts").apply(model, progress=lambda *at: seen.append(at)).undo()
    total = model.experts.nbytes
    assert seen == [(0, total), (total / 2, total), (total, total)]


def test_what_was_asked_before_stays(model: Model) -> None:
    with model.override(threads=1), RuleSet.read("torch-reference").applied(model):
        bank = model.experts[0]
        assert (bank.request.threads, bank.request.backend) == (1, "torch")


def test_from_the_command_line(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    from ktlab.cli import main

    path = tmp_path / "both.yaml"
    path.write_text(GPU_AND_CPU)
    assert main(["rules", "preview", str(path), "tiny"]) == 0
    assert "both.yaml: 8 rules on ktlab tiny" in capsys.readouterr().out
    assert main(["rules", "preview", "amx-int8-experts", "tiny", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["status"], row["count"]) == ("changes", 6)
    assert main(["rules", "preview", str(path), "tiny", "--strict"]) == 2
    assert "asks for cuda:1 from layer 2 on" in capsys.readouterr().err
    path.write_text("- match: {name: '('}")
    assert main(["rules", "preview", str(path), "tiny"]) == 2
    assert "both.yaml: 2 problems: line 1, column 3" in capsys.readouterr().err
    path.write_text(one("nowhere", "default") + "- match: {nam: a}\n  replace: {class: default}")
    assert main(["rules", "preview", str(path), "tiny"]) == 2
    said = capsys.readouterr().err
    assert "unknown key 'nam'" in said and "rule 1 matches nothing: no module here has" in said
