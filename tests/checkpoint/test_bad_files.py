"""Files that are not what they say are refused: always CheckpointError, never anything else."""

import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ktlab
from ktlab.checkpoint import open_checkpoint
from ktlab.checkpoint.header import read_header
from ktlab.errors import CheckpointError
from ktlab.model.model import Model

Damage = Callable[[Callable[[bytearray], object]], Path]
TENSOR_COUNT, FIELD_COUNT = 8, 16


def refused(path: Path, *expected: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    for part in (path.name, *expected):
        assert part in message
    return message


def entry_position(content: bytearray, name: str) -> int:
    """Where the dimensions' count of that tensor's entry stands."""
    raw = name.encode()
    return content.index(struct.pack("<Q", len(raw)) + raw) + 8 + len(raw)


def poke(code: str, position: int, value: int) -> Callable[[bytearray], None]:
    return lambda content: struct.pack_into("<" + code, content, position, value)


def test_not_a_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\3\4" + bytes(100))
    refused(path, "not a GGUF file", r"b'PK\x03\x04'")
    path.write_bytes(b"")
    refused(path, "not a GGUF file: 0 bytes")


def test_versions_and_byte_order(damaged: Damage) -> None:
    refused(damaged(poke("I", 4, 1)), "GGUF version 1, expected one of (2, 3)")
    refused(damaged(poke("I", 4, 4)), "GGUF version 4", "it was made for a later reader")
    refused(damaged(poke("I", 4, 3 << 24)), "big-endian")


@pytest.mark.parametrize("where", [TENSOR_COUNT, FIELD_COUNT])
@pytest.mark.parametrize("count", [10**5, 2**40, 2**64 - 1])
def test_absurd_counts_allocate_nothing(damaged: Damage, where: int, count: int) -> None:
    path = damaged(poke("Q", where, count))
    tracemalloc.start()
    refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_absurd_array_length(damaged: Damage) -> None:
    key = b"tokenizer.ggml.tokens"

    def change(content: bytearray) -> None:
        start = content.index(key) + len(key)
        assert struct.unpack_from("<II", content, start) == (9, 8)
        struct.pack_into("<Q", content, start + 8, 2**61)

    refused(damaged(change), "the length of tokenizer.ggml.tokens", "truncated or corrupt")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_anywhere(gguf_path: Path, tmp_path: Path, share: float) -> None:
    content = gguf_path.read_bytes()
    # The writer pads the last tensor: cut at least into its bytes.
    path = tmp_path / "cut.gguf"
    path.write_bytes(content[: int(share * (len(content) - 32))])
    refused(path)


def test_truncated_data_says_where(gguf_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    size = gguf_path.stat().st_size
    path.write_bytes(gguf_path.read_bytes()[: size // 2])
    refused(path, "22 of 52 tensors lie beyond", f"the file ends at {size // 2} (truncated?)")


def test_size_lies(damaged: Damage) -> None:
    """A shape, a type or an offset that does not fit the bytes there are."""
    name = "blk.1.ffn_up_exps.weight"

    def rows(content: bytearray) -> None:
        struct.pack_into("<Q", content, entry_position(content, name) + 4 + 8, 31)

    def type_(content: bytearray) -> None:
        struct.pack_into("<I", content, entry_position(content, name) + 4 + 24, 0)

    def offset(content: bytearray) -> None:
        position = entry_position(content, name) + 4 + 24 + 4
        value = struct.unpack_from("<Q", content, position)[0]
        struct.pack_into("<Q", content, position, value - 64)

    for change in (rows, type_, offset):
        refused(damaged(change), "lies about its size")


def test_offset_beyond_the_file(damaged: Damage) -> None:
    def change(content: bytearray) -> None:
        position = entry_position(content, "token_embd.weight") + 4 + 16 + 4
        struct.pack_into("<Q", content, position, 2**63)

    refused(damaged(change), "1 of 52 tensors lie beyond", "token_embd.weight")


def test_tensors_that_overlap(damaged: Damage) -> None:
    def change(content: bytearray) -> None:
        position = entry_position(content, "token_embd.weight")
        # number of dimensions, two of them, type: then the offset
        offset = position + 4 + 16 + 4
        (found,) = struct.unpack_from("<Q", content, offset)
        struct.pack_into("<Q", content, offset, found - 32 if found else 32)

    refused(damaged(change), "the tensors before it end at", "one of them lies about its size")


def test_type_that_nobody_knows(damaged: Damage) -> None:
    def change(content: bytearray) -> None:
        struct.pack_into("<I", content, entry_position(content, "token_embd.weight") + 20, 99)

    refused(damaged(change), "token_embd.weight", "unknown type 99", "no kernel here computes")


def test_row_that_is_no_whole_block(damaged: Damage) -> None:
    def change(content: bytearray) -> None:
        struct.pack_into("<Q", content, entry_position(content, "token_embd.weight") + 4, 65)

    refused(damaged(change), "272×65", "a row must be a multiple of 32")


def test_dimensions(damaged: Damage) -> None:
    def change(content: bytearray) -> None:
        struct.pack_into("<I", content, entry_position(content, "token_embd.weight"), 2**31)

    refused(damaged(change), "token_embd.weight has 2147483648 dimensions")


@pytest.mark.parametrize("name", ["output.weight", "general.name"])
def test_text_that_is_no_utf8(damaged: Damage, name: str) -> None:
    refused(damaged(lambda content: content.replace(name.encode(), b"\xff" * len(name))))


def test_duplicate_tensor(damaged: Damage) -> None:
    refused(
        damaged(lambda content: content.replace(b"blk.1.ffn_up_exps", b"blk.2.ffn_up_exps")),
        "blk.2.ffn_up_exps.weight appears 2 times",
    )


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_to_the_header(gguf_path: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Opens and answers, or raises CheckpointError; nothing else."""
    content = bytearray(gguf_path.read_bytes())
    end = min(entry.offset for entry in read_header(gguf_path).entries)
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, end - 1))
        content[position] = data.draw(st.integers(0, 255))
    path = tmp_path / "random.gguf"
    path.write_bytes(content)
    try:
        checkpoint = open_checkpoint(path)
        checkpoint.tensor("blk.1.attn_v_b.weight").dequantize()
        assert checkpoint.tokenizer is None or checkpoint.tokenizer.encode("text")
    except CheckpointError:
        pass


EXTREMES = (0, 1, 2, 7, 8, 9, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)


def mutate(content: bytearray, end: int, random: np.random.Generator) -> bytearray:
    """One to four faults before byte `end`: numbers made extreme, bytes lost, doubled or zeroed."""
    for _ in range(random.integers(1, 5)):
        position = int(random.integers(4, end))
        kind = random.integers(6)
        if kind < 3:
            code, bits = [("<Q", 64), ("<I", 32), ("<H", 16)][kind]
            value = EXTREMES[random.integers(len(EXTREMES))] % 2**bits
            struct.pack_into(code, content, position, value)
        elif kind == 3:
            del content[position : position + int(random.integers(1, 65))]
        elif kind == 4:
            content[position:position] = content[position : position + int(random.integers(1, 65))]
        else:
            content[position : position + 32] = bytes(32)
    return content


def test_fuzzed_headers(gguf_path: Path, tmp_path: Path) -> None:
    """Refused by our error, or opened and built; nothing else, and nothing large is allocated."""
    whole, path = gguf_path.read_bytes(), tmp_path / "fuzzed.gguf"
    end = min(entry.offset for entry in read_header(gguf_path).entries)
    opened = 0
    tracemalloc.start()
    for seed in range(200):
        path.write_bytes(mutate(bytearray(whole), end, np.random.default_rng(seed)))
        try:
            checkpoint = open_checkpoint(path)
            repr(checkpoint), Model(checkpoint), checkpoint.tokenizer
            ktlab.plan(path)
            opened += 1
        except CheckpointError as error:
            assert path.name in str(error), f"seed {seed}"
            assert len(str(error)) < 20_000, f"seed {seed}"
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20
    assert opened, "some faults are harmless"


def test_a_lost_key_whose_tensors_are_there(damaged: Damage) -> None:
    path = damaged(lambda content: content.replace(b"expert_shared_count", b"expert_shared_c0unt"))
    expected = "blk.1.ffn_gate_shexp.weight and 1 more like it have no place"
    refused(path, expected)
    with pytest.raises(CheckpointError, match=expected):
        ktlab.plan(path)


# ------------------------------------------------------------- while it is open
CUT = """
import os, sys, torch
torch.set_num_threads(1)
from ktlab.checkpoint import open_checkpoint
from ktlab.errors import CheckpointError
from ktlab.model.model import Model
for number, use in enumerate(sys.argv[2:]):
    path = f"{sys.argv[1]}/{number}-model.gguf"
    with open(path, "wb") as file, open(f"{sys.argv[1]}/whole", "rb") as whole:
        file.write(whole.read())
    model = Model(open_checkpoint(path))
    os.truncate(path, 1000)
    try:
        exec(use)
        print("NOTHING")
    except CheckpointError as error:
        print(error)
"""
USES = (
    "model.forward([1, 2, 3])",
    "next(iter(model.stream([1, 2, 3])))",
    "model.generate('text')",
    "model.trace('text')",
    "model.tokenizer",
    "model.checkpoint.metadata['tokenizer.ggml.tokens']",
    "model.checkpoint.fingerprint",
    "model.checkpoint.tensor('blk.1.ffn_up_exps.weight').dequantize()",
    "model.set(quantize='q4_0')",
    "model.requantized(model.layers[1].experts, 'q4_0')",
    "model.set(layout='packed')",
    "model.experts.use(format='q4_0')",
    "model.pack()",
)


def test_a_file_that_is_written_to_while_it_is_mapped(gguf_path: Path, tmp_path: Path) -> None:
    """Refused whatever is asked of it, in a process of its own: a look at what is gone ends it."""
    (tmp_path / "whole").write_bytes(gguf_path.read_bytes())
    command = [sys.executable, "-c", CUT, str(tmp_path), *USES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    for number, line in enumerate(done.stdout.splitlines()):
        expected = f"{number}-model.gguf was written to since it was opened"
        assert line.startswith(expected) and " 1,000 now" in line, USES[number]
    answered = len(done.stdout.splitlines())
    assert answered == len(USES), f"{USES[answered]}: {done.returncode} {done.stderr[-500:]}"


def test_a_file_that_is_replaced_stays_as_it_was(gguf_path: Path, tmp_path: Path) -> None:
    path, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
    path.write_bytes(gguf_path.read_bytes())
    model = Model(open_checkpoint(path))
    before = model.forward([1, 2, 3])
    other.write_bytes(b"something else")
    other.replace(path)
    torch.testing.assert_close(model.forward([1, 2, 3]), before)


# ------------------------------------------------------------- well-formed, but not our model
def write(path: Path, architecture: str, fields: dict[str, object]) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_unknown_architecture(tmp_path: Path) -> None:
    path = write(tmp_path / "llama.gguf", "llama", {})
    families = ("'deepseek2' (DeepSeek-V2", "'qwen3moe' (Qwen3-30B", "'olmoe' (OLMoE-1B-7B)")
    refused(path, "architecture 'llama', expected one of", *families)


def test_split_checkpoint(tmp_path: Path) -> None:
    path = write(tmp_path / "part.gguf", "deepseek2", {"split.count": 9})
    refused(path, "one of 9 shards", "does not end in -00001-of-00009.gguf")


def test_missing_keys_are_listed_together(tmp_path: Path) -> None:
    path = write(tmp_path / "empty.gguf", "deepseek2", {"deepseek2.block_count": "three"})
    message = refused(path, "deepseek2.block_count is 'three', expected a whole number")
    for key in ("embedding_length", "expert_count", "attention.kv_lora_rank"):
        assert f"deepseek2.{key} is missing" in message
    assert "vocab_size" not in message, "taken from token_embd"


def test_absurd_layer_count_builds_no_tables(damaged: Damage) -> None:
    key = b"deepseek2.block_count"

    def change(content: bytearray) -> None:
        struct.pack_into("<I", content, content.index(key) + len(key) + 4, 10**9)

    refused(damaged(change), "block_count is 1000000000", "only 52 tensors")


def test_missing_and_misshapen_tensors_are_listed_together(damaged: Damage) -> None:
    def change(content: bytearray) -> bytearray:
        # experts 16 -> 8: every expert tensor of both layers is wrong; and one is misnamed
        key = b"deepseek2.expert_count"
        struct.pack_into("<I", content, content.index(key) + len(key) + 4, 8)
        return content.replace(b"blk.2.attn_norm", b"blk.2.attn_nurm")

    message = refused(damaged(change), "problems")
    assert "blk.2.attn_norm.weight is missing (expected shape (64,))" in message
    assert 'did you mean "blk.2.attn_nurm.weight"' in message
    for layer in (1, 2):
        expected = f"blk.{layer}.ffn_gate_exps.weight has shape (16, 32, 64), expected (8, 32, 64)"
        assert expected in message


def test_impossible_configuration(damaged: Damage) -> None:
    key = b"deepseek2.expert_used_count"

    def change(content: bytearray) -> None:
        struct.pack_into("<I", content, content.index(key) + len(key) + 4, 9)

    refused(damaged(change), "top_k 9 is outside 1..8")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match='no file .*modell.gguf; did you mean "model.gguf"'):
        open_checkpoint(tmp_path / "modell.gguf")
    with pytest.raises(CheckpointError, match="is a folder without .*a .gguf file or one of: tiny"):
        open_checkpoint(tmp_path / "empty")
    with pytest.raises(CheckpointError, match='did you mean "tiny"'):
        open_checkpoint("tinny")


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "l.gguf").symlink_to("gone.gguf")
    for read in (open_checkpoint, ktlab.plan):
        with pytest.raises(CheckpointError, match=r"l.gguf: it is a link to gone.gguf, which") as e:
            read(tmp_path / "l.gguf")
        assert "did you mean" not in str(e.value)
