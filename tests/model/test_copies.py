"""Copies that a switch would make: counted before they are made, refused where they do not fit."""

from dataclasses import replace

import pytest

import ktlab
from ktlab.checkpoint.synthesis import TINY_V2_CONFIG, synthesize
from ktlab.errors import SettingError
from ktlab.memory import memory
from ktlab.model import copies
from ktlab.model.copies import format_bytes, kept_bytes, prepared_bytes, room

Q8 = {"*_exps*": "q8_0", "*": "f32"}


@pytest.fixture
def model() -> ktlab.Model:
    return ktlab.Model(synthesize(TINY_V2_CONFIG, formats=Q8))


def available(monkeypatch: pytest.MonkeyPatch, *bytes_: int) -> None:
    """Memory as it will be found: one answer a look, the last one from then on."""
    answers = list(bytes_)

    def look() -> object:
        return replace(memory(), available=answers.pop(0) if len(answers) > 1 else answers[0])

    monkeypatch.setattr(copies, "memory", look)


def test_another_format_is_refused_before_anything_is_made(
    model: ktlab.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, needed = model.settings, sum(format_bytes(b, "q4_0") for b in model.experts)
    assert needed == sum(bank.quantized("q4_0").nbytes for bank in model.clone().experts)
    for bank in model.experts:
        bank.let_go()
    available(monkeypatch, needed - 1)
    for refused in (
        lambda: model.set(quantize="q4_0"),
        lambda: model.experts.use(format="q4_0"),
        lambda: model.set(quantize={"attention": "q4_0", "experts": "q4_0"}),
    ):
        with pytest.raises(SettingError, match=r"experts as q4_0.* free beside the model; nothing"):
            refused()
        assert model.settings == settings and not any(b.kept_formats for b in model.experts)
    layer = model.moe_blocks[0].index
    with model.override(quantize={layer: "q4_0"}):
        assert model.layers[layer].experts.format == "q4_0", "one layer fits"
    available(monkeypatch, needed)
    with model.override(quantize="q4_0"):
        pass
    available(monkeypatch, 0)
    with model.override(quantize="q4_0"):
        pass  # made before: costs nothing


def test_copies_that_nobody_uses_make_room(
    model: ktlab.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with model.override(quantize="q5_0"):
        pass
    needed = sum(format_bytes(bank, "q4_0") for bank in model.experts)
    available(monkeypatch, 0, needed)
    model.set(quantize="q4_0")
    assert {bank.kept_formats for bank in model.experts} == {("q4_0",)}


@pytest.mark.parametrize("words", [{"backend": "torch"}, {"layout": "packed"}], ids=str)
def test_copies_for_kernels_are_refused_before(
    model: ktlab.Model, monkeypatch: pytest.MonkeyPatch, words: dict[str, str]
) -> None:
    model.set(layout="ggml_blocks")  # so small that they would be packed otherwise
    settings, before = model.settings, prepared_bytes(model.experts)
    available(monkeypatch, before)
    for refused in (lambda: model.set(**words), lambda: model.experts.use(**words)):
        with pytest.raises(SettingError, match="this backend or layout needs"):
            refused()
        assert model.settings == settings
    available(monkeypatch, 1 << 40)
    with model.override(**words):
        needed = prepared_bytes(model.experts)
        assert needed > before
        model.forward([1, 2, 3, 4, 5, 6, 7, 8])
        assert prepared_bytes(model.experts) == 0 < sum(model.experts.prepared_bytes.values())
    available(monkeypatch, 0)
    model.experts.use(**words)  # made before


def test_a_format_and_a_backend_for_it_in_one_go(model: ktlab.Model) -> None:
    model.experts.use(backend="native")  # which has no mxfp4, as it stands until numpy is named
    with model.override(format={"output": "mxfp4", "experts": "mxfp4"}, backend="numpy"):
        assert model.experts[0].kernel.backend == "numpy"


def test_the_models_own_file_keeps_its_place(
    model: ktlab.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = ktlab.load("tiny")
    assert tiny.checkpoint.path is not None
    own = tiny.checkpoint.path.stat().st_size
    available(monkeypatch, 10 * own)
    assert room(tiny) == 9 * own and room(model) == 10 * own
    available(monkeypatch, own)  # cannot be held beside anything: a small copy may still be made
    assert room(tiny) == own // copies.KEPT_SHARE


def test_copies_of_a_large_model_stay_only_while_they_are_wanted(
    model: ktlab.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with model.override(quantize={"experts": "q5_0", "attention": "q5_0"}):
        pass
    kept = kept_bytes(model)
    with model.override(quantize={"attention": "q4_0"}):
        pass
    assert kept_bytes(model) > kept, "little is kept for a toggle back"
    monkeypatch.setattr(copies, "UNUSED_BYTES", kept)
    monkeypatch.setattr(copies, "UNUSED_SHARE", 1 << 40)
    with model.override(quantize={"experts": "q5_0", "attention": "q8_0"}):
        assert {bank.kept_formats for bank in model.experts} == {("q5_0",)}, "asked for again"
        for block in model.layers:
            made = [linear._requantized for linear in block.attention.linears.values()]
            assert all(set(formats) == {"q8_0"} for formats in made)


def test_what_is_made_in_passing_is_forgotten(model: ktlab.Model) -> None:
    model.forward([1, 2, 3])
    stacks = [s for product in copies.every_product(model) for s in product.stacks]
    before = [stack.operand_bytes for stack in stacks]
    expected = model.forward([1, 2, 3])
    with copies.passing(model), model.override(backend="torch", quantize="q4_0"):
        model.forward([1, 2, 3])
        assert kept_bytes(model) > 0 and [stack.operand_bytes for stack in stacks] != before
    assert kept_bytes(model) == 0 and [stack.operand_bytes for stack in stacks] == before
    assert model.forward([1, 2, 3]).equal(expected)


def test_packed_weights_without_blocks_are_not_forgotten(model: ktlab.Model) -> None:
    (stack, *_) = model.moe_blocks[0].experts.stacks
    expected = stack.tensor.dequantize()
    model.experts.use(layout="packed")
    model.forward([1, 2, 3])
    stack._tensor = None  # as `release` leaves a copy that is not mapped
    stack.forget()
    assert stack.packed and (stack.tensor.dequantize() == expected).all()


def test_rules_that_were_applied_leave_no_large_copies(
    model: ktlab.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = ktlab.RuleSet.read("amx-int8-experts")
    with rules.applied(model):
        pass
    kept = kept_bytes(model)
    assert kept > 0, "little is kept for a toggle back"
    monkeypatch.setattr(copies, "UNUSED_BYTES", kept - 1)
    monkeypatch.setattr(copies, "UNUSED_SHARE", 1 << 40)
    with rules.applied(model):
        assert kept_bytes(model) == kept
    assert kept_bytes(model) == 0
