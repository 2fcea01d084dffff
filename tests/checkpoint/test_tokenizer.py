"""Text survives encoding; pieces add up; control tokens come only when asked for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, pre_tokenizers, trainers

from ktlab.checkpoint import open_checkpoint, write_gguf
from ktlab.checkpoint.pretokenizers import PRE_TOKENIZERS
from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.checkpoint.tokenizer import Tokenizer, byte_tokenizer
from ktlab.errors import CheckpointError

BYTES = byte_tokenizer(272)
TEXT = "def f(x):\n    return x + 12345  # größer, 漢字とカナ, Привет, été, 🙂‍↔️\r\n\r\n"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


def train(path: Path, pre: str, size: int = 272) -> tokenizers.Tokenizer:
    """A tokenizer.json made by the `tokenizers` library alone."""
    peer = tokenizers.Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in PRE_TOKENIZERS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    peer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    peer.train_from_iterator([TEXT * 3], trainer)
    peer.save(str(path))
    return peer


@pytest.fixture(scope="module", params=["deepseek-v3", "gpt-2"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    peer = train(path, request.param, 320)
    return Tokenizer.from_file(path), peer


@given(text=st.text())
def test_decode_undoes_encode(text: str) -> None:
    text = text.encode("utf-8", errors="ignore").decode()
    ids = BYTES.encode(text)
    assert ids[0] == BYTES.bos_id
    assert BYTES.decode(ids) == text
    assert "".join(BYTES.pieces(ids, special=False)) == text


@given(ids=st.lists(st.integers(0, 271)))
def test_pieces_add_up_for_any_ids(ids: list[int]) -> None:
    for special in (False, True):
        pieces = BYTES.pieces(ids, special=special)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == BYTES.decode(ids, special=special)


def test_a_character_belongs_to_the_token_that_completes_it() -> None:
    assert BYTES.pieces(BYTES.encode("aé漢", bos=False)) == ["a", "", "é", "", "", "漢"]
    assert BYTES.pieces(BYTES.encode("é", bos=False)[:1]) == ["\ufffd"]
    assert BYTES.decode_bytes(BYTES.encode("é", bos=False)[:1]) == b"\xc3"


def test_agrees_with_the_library(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    ours, peer = pair
    for text in (TEXT, "", " ", "\n\n", "a  b", "12 1234", "x" * 500, TEXT[::-1]):
        expected = peer.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, bos=False) == expected
        assert ours.decode(expected) == text


def test_from_file(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    ours, peer = pair
    assert ours.vocab_size == peer.get_vocab_size()
    assert (ours.bos_id, ours.eos_id) == (0, 1)
    assert f"{ours.vocab_size} tokens" in repr(ours) and ours.pre in repr(ours)


def test_through_a_gguf(pair: tuple[Tokenizer, tokenizers.Tokenizer], tmp_path: Path) -> None:
    ours, _ = pair
    if ours.vocab_size > TINY_TEST_CONFIG.vocab_size:
        ours = byte_tokenizer(260)
    model = synthesize(TINY_TEST_CONFIG)
    tensors = {name: model.tensor(name) for name in model.names()}
    path = write_gguf(tmp_path / "t.gguf", model.config, tensors, ours)
    read = open_checkpoint(path).tokenizer
    assert read is not None
    assert read.vocab_size == 272, "padded to the rows of the embedding"
    assert read.encode(TEXT) == ours.encode(TEXT)
    assert (read.pre, read.merges, read.bos_id) == (ours.pre, ours.merges, ours.bos_id)


def test_control_tokens_only_when_asked(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    ours, _ = pair
    text = f"a{EOS}b"
    assert 1 not in ours.encode(text)
    assert ours.decode(ours.encode(text)) == text
    ids = ours.encode(text, special=True)
    assert ids[0] == 0 and ids.count(1) == 1
    assert ours.decode(ids) == "ab"
    assert ours.decode(ids, special=True) == f"{BOS}a{EOS}b"


def test_bos_is_left_out_where_the_model_had_none() -> None:
    without = Tokenizer(BYTES.tokens, [], pre="gpt-2", types=BYTES.types, bos_id=256, add_bos=False)
    assert without.encode("a") == [97 - 33] or without.decode(without.encode("a")) == "a"
    assert without.bos_id not in without.encode("a")
    assert BYTES.encode("", bos=True) == [256] and BYTES.encode("", bos=False) == []


def test_added_tokens_of_the_user_are_found_in_text() -> None:
    tokens = [*BYTES.tokens[:258], "<tool>"]
    types = [*BYTES.types[:258], 4]
    tokenizer = Tokenizer(tokens, [], pre="gpt-2", types=types, bos_id=256)
    assert tokenizer.encode("a<tool>b", bos=False) == [97, 258, 98]
    assert tokenizer.decode([97, 258, 98]) == "a<tool>b"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tokenizer.ggml.pre": "deepseek_v3"}, '"deepseek_v3" is not known.*"deepseek-v3"'),
        ({"tokenizer.ggml.pre": None}, "is not known here"),
        ({"tokenizer.ggml.model": "llama"}, "model 'llama' is not known.*'gpt2'"),
        ({"tokenizer.ggml.tokens": None}, "tokens is missing"),
        ({"tokenizer.ggml.token_type": [1]}, "1 token types for 272 tokens"),
        ({"tokenizer.ggml.bos_token_id": 999}, "bos token 999 is outside 0..271"),
        ({"tokenizer.ggml.eos_token_id": "x"}, "eos token 'x' is outside"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "is no pair"),
        ({"tokenizer.ggml.merges": ["漢 字"]}, "unusable tokenizer"),
    ],
)
def test_bad_metadata(changes: dict[str, object], expected: str) -> None:
    fields: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": BYTES.tokens,
        "tokenizer.ggml.token_type": BYTES.types,
    } | changes
    fields = {key: value for key, value in fields.items() if value is not None}
    with pytest.raises(CheckpointError, match=expected):
        Tokenizer.from_gguf(fields, "x.gguf")


def _bert(content: dict) -> None:
    content["model"]["type"] = "WordPiece"


def _other_cut(content: dict) -> None:
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "x"


def _prefix_space(content: dict) -> None:
    content["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_bert, "WordPiece, expected byte-level BPE"),
        (_other_cut, "which is none of deepseek-v3, gpt-2"),
        (_prefix_space, "puts a space before"),
        (lambda content: content.pop("model"), "not a tokenizer.json"),
    ],
)
def test_bad_files(change: Callable[[dict], object], expected: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    train(path, "deepseek-v3")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=expected):
        Tokenizer.from_file(path)


def test_naming_a_token_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    peer = train(path, "gpt-2")
    peer.add_special_tokens([AddedToken("<turn>")])
    peer.save(str(path))
    assert Tokenizer.from_file(path, eos="<turn>").eos_id == peer.token_to_id("<turn>")
    with pytest.raises(CheckpointError, match='no token "<turm>"; did you mean "<turn>"'):
        Tokenizer.from_file(path, eos="<turm>")


def test_ids_outside_the_vocabulary() -> None:
    with pytest.raises(CheckpointError, match="token 272 is outside the vocabulary of 272"):
        BYTES.decode([272])
    with pytest.raises(CheckpointError, match="token -1"):
        BYTES.decode([-1])


def test_too_small_for_bytes() -> None:
    with pytest.raises(CheckpointError, match="258 tokens or more"):
        byte_tokenizer(100)
