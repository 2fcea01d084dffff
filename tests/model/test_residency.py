"""What is mapped, resident and converted, and what is said where memory is too small."""

import warnings
from pathlib import Path

import pytest

import ktlab
from ktlab.memory import Memory
from ktlab.model import residency
from ktlab.model.residency import SlowFromDisk
from ktlab.record import Record


def short_of_memory(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    found = Memory(total=10**9, available=available, limit=None, swap_total=0, swap_used=0)
    monkeypatch.setattr(residency, "memory", lambda: found)


def test_a_loaded_file_is_mapped_and_becomes_resident_with_use() -> None:
    model = ktlab.load("tiny")
    path = model.checkpoint.path
    assert path is not None
    before = model.residency()
    assert before.mapped == path.stat().st_size and before.converted == 0 and before.disk is None
    model.generate("Hello", max_new_tokens=2)
    after = model.residency()
    if before.resident is not None and after.resident is not None:
        # What is packed gives its pages of the file back.
        assert before.resident < after.resident + after.converted
        assert after.resident <= after.mapped
    floats = [block.attention.linears[name] for block in model.layers for name in ("k_b", "v_b")]
    assert after.converted >= sum(4 * linear.stack.size for linear in floats)
    assert str(after).splitlines()[0] in repr(model)


def test_packed_and_requantized_weights_are_converted_ones() -> None:
    model = ktlab.load("tiny")
    experts = sum(block.experts.nbytes for block in model.moe_blocks)
    with model.override(layout="packed"):
        model.generate("Hello", max_new_tokens=1)
        assert model.residency().converted >= experts
    made = ktlab.load("tiny", convert={"q8_0": "q4_0"}).residency()
    assert made.converted > 0.5 * experts


def test_a_copy_in_another_format_gives_the_pages_it_was_made_of_back() -> None:
    model = ktlab.load("tiny")
    model.set(layout="ggml_blocks")
    logits = model.forward([1, 2, 3])
    block = model.moe_blocks[0]
    for stack in block.experts.stacks:
        stack.tensor.blocks.sum()  # reads all
    before = model.residency().resident
    with model.override(quantize={block.index: "q4_0"}):
        after = model.residency().resident
        assert not model.forward([1, 2, 3]).equal(logits)
    if before is None or after is None:
        pytest.skip("this system does not say what of a file is in memory")
    assert before - after > block.experts.nbytes / 2
    assert model.forward([1, 2, 3]).equal(logits)


def test_memory_that_is_too_small_is_said_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    short_of_memory(monkeypatch, 10_000_000)
    with pytest.warns(SlowFromDisk, match="memory has no room for .* of the weights"):
        model = ktlab.load("tiny")
    disk = model.residency().disk
    assert disk is not None and disk.missing_bytes > 0
    assert f" memory: {disk}" in " ".join(repr(model).split())
    assert disk.rate is None or disk.tokens_per_s == disk.rate / disk.bytes_per_token
    # Half as many are wanted at top 4, so half as many are missed.
    with model.override(top_k=4):
        fewer = model.residency().disk
    assert fewer is not None and fewer.bytes_per_token < 0.6 * disk.bytes_per_token


def test_enough_memory_is_not_mentioned() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowFromDisk)
        assert "from disk" not in repr(ktlab.load("tiny"))


def test_a_model_in_memory_has_no_files(tmp_path: Path) -> None:
    from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
    from ktlab.model.model import Model

    found = Model(synthesize(TINY_TEST_CONFIG)).residency()
    assert found.mapped == 0 and found.resident == 0 and found.disk is None
    assert isinstance(found, Record) and type(found).from_json(found.to_json()) == found
