"""Text survives encoding; ids are Hugging Face's and llama.cpp's; control tokens when asked for."""

import importlib.util
import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from ktlab.checkpoint import open_checkpoint, write_gguf
from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.checkpoint.tokenizer import Tokenizer, byte_tokenizer
from ktlab.errors import CheckpointError
from tests.checkpoint.published import BOS, CAMEL, COMPOSED, EOS, HARD_TEXT, STEPS, TOOL, train

BYTES = byte_tokenizer(272)
TEXT = HARD_TEXT


@pytest.fixture(scope="module", params=list(STEPS))
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
    for text in (TEXT, CAMEL, "", " ", "\n\n", "a  b", "12 1234", "x" * 500, TEXT[::-1]):
        expected = peer.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, bos=False) == expected
        if unicodedata.is_normalized("NFC", text):
            assert ours.decode(expected) == text


def test_decomposed_characters(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    ours, peer = pair
    text = unicodedata.normalize("NFD", TEXT)
    assert ours.encode(text, bos=False) == peer.encode(text, add_special_tokens=False).ids
    same = ours.encode(text, bos=False) == ours.encode(TEXT, bos=False)
    assert same == (ours.pre in COMPOSED), "Qwen's and OLMo's tokenizers compose them first"


def test_from_file(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    ours, peer = pair
    assert ours.vocab_size == peer.get_vocab_size()
    assert (ours.bos_id, ours.eos_id) == (0, 1)
    assert f"{ours.vocab_size} tokens" in repr(ours) and ours.pre in repr(ours)


def test_through_a_gguf(
    pair: tuple[Tokenizer, tokenizers.Tokenizer], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What gguf-py writes and llama.cpp calls by the pre-tokenizer's name gives the same ids."""
    ours, peer = pair
    path = written(ours, tmp_path_factory.mktemp("gguf"))
    read = open_checkpoint(path).tokenizer
    assert read is not None and read.pre == ours.pre
    assert read.vocab_size == ours.vocab_size + 8, "padded to the rows of the embedding"
    assert (read.merges, read.bos_id, read.stop_ids) == (ours.merges, ours.bos_id, ours.stop_ids)
    for text in (TEXT, CAMEL, TEXT[::-1], unicodedata.normalize("NFD", TEXT), f"a{TOOL}{EOS}b"):
        peer.encode_special_tokens = True
        assert read.encode(text, bos=False) == peer.encode(text, add_special_tokens=False).ids
        peer.encode_special_tokens = False
        expected = peer.encode(text, add_special_tokens=False).ids
        assert read.encode(text, bos=False, special=True) == expected


def written(tokenizer: Tokenizer, folder: Path) -> Path:
    """A GGUF with that tokenizer and a few unused rows more."""
    model = synthesize(replace(TINY_TEST_CONFIG, vocab_size=tokenizer.vocab_size + 8))
    tensors = {name: model.tensor(name) for name in model.names()}
    return write_gguf(folder / f"{tokenizer.pre}.gguf", model.config, tensors, tokenizer)


def test_llama_cpp_cuts_the_same(tmp_path: Path) -> None:
    """llama.cpp's own rules for these names, where they are those of the models."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp (llama.cpp as a wheel) is not installed")
    ours, texts = {}, {}
    for pre in STEPS:
        train(tmp_path / "tokenizer.json", pre, 500)
        tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
        path = str(written(tokenizer, tmp_path))
        # Composed already, because llama.cpp does not compose; in the case of kimi-k2 lower case,
        # because llama.cpp does not cut where the case changes.
        texts[path] = [unicodedata.normalize("NFC", text) for text in (TEXT, TEXT[::-1])]
        texts[path] += [TOOL + CAMEL, f"{BOS}a{EOS}"]
        if pre == "kimi-k2":
            texts[path] = [text.lower() for text in texts[path]]
        ours[path] = [
            [tokenizer.encode(text, bos=False, special=special) for text in texts[path]]
            for special in (False, True)
        ]
    assert llama_cpp_ids(texts) == ours


LLAMA_CPP = """
import json, sys, urllib.request, xllamacpp
answers = {}
for path, texts in json.loads(sys.stdin.read()).items():
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers = 64, 1, False, 0
    server = xllamacpp.Server(params)
    def ids(text, special):
        body = {"content": text, "add_special": False, "parse_special": special}
        request = urllib.request.Request(
            server.listening_address + "/tokenize", json.dumps(body).encode(),
            {"Content-Type": "application/json"})
        return json.loads(urllib.request.urlopen(request).read())["tokens"]
    answers[path] = [[ids(text, special) for text in texts] for special in (False, True)]
    del server
print("ANSWER", json.dumps(answers))
"""


def llama_cpp_ids(texts: dict[str, list[str]]) -> dict[str, list[list[list[int]]]]:
    """{file: [ids of its texts as plain text, with control tokens read]} from llama.cpp."""
    done = subprocess.run(
        [sys.executable, "-c", LLAMA_CPP],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"NO_PROXY": "*", "no_proxy": "*"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert lines, done.stderr[-2000:]
    answers: dict[str, list[list[list[int]]]] = json.loads(lines[0].removeprefix("ANSWER"))
    return answers


@pytest.mark.parametrize(
    ("broken", "read_as"),
    [
        (b"a\xffb", "a\ufffdb"),
        (b"caf\xc3", "caf\ufffd"),
        (b"\xf0\x9f\x99 cut off", "\ufffd cut off"),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),  # a surrogate in UTF-8
        ("a\udcffb", "a\ufffdb"),  # surrogateescape: what sys.argv and open() may hold
        ("\udcc3\udca9", "é"),  # two bytes that are UTF-8 after all
        ("lone \ud83d", "lone \ufffd"),
        ("\ud83d\ude42", "🙂"),  # UTF-16, as JavaScript may send it
    ],
)
def test_broken_utf8_is_read_as_the_replacement_character(
    broken: str | bytes, read_as: str, pair: tuple[Tokenizer, tokenizers.Tokenizer]
) -> None:
    ours, peer = pair
    assert ours.encode(broken, bos=False) == peer.encode(read_as, add_special_tokens=False).ids
    assert ours.decode(ours.encode(broken)) == read_as


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
        ({"tokenizer.ggml.merges": [1, 2]}, r"merges is \[1, 2\], expected a list of texts"),
        ({"tokenizer.ggml.token_type": ["a"] * 272}, "expected a list of whole numbers"),
        ({"tokenizer.ggml.tokens": [b"a"]}, "tokens is .*, expected a list of texts"),
        (
            {"tokenizer.ggml.token_type": 3, "tokenizer.ggml.merges": 7},
            "merges is 7, expected a list of texts; .*token_type is 3, expected a list of whole",
        ),
        ({"tokenizer.ggml.bos_token_id": True}, "bos token True is outside"),
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


def _metaspace(content: dict) -> None:
    content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}


def _far_id(content: dict) -> None:
    content["added_tokens"][0]["id"] = 10**9


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_bert, "WordPiece, expected byte-level BPE"),
        (_metaspace, "without a ByteLevel step"),
        (_far_id, "largest token id is 1000000000"),
        (lambda content: content.pop("model"), "not a tokenizer.json"),
        (lambda content: content.update(pre_tokenizer=5), "tokenizer.json: not a tokenizer.json"),
        (lambda content: content["pre_tokenizer"].update(pretokenizers=[5]), "not a tokenizer.js"),
        (lambda content: content["pre_tokenizer"].update(pretokenizers=7), "not a tokenizer.json"),
        (lambda content: content.update(normalizer=[5]), "not a tokenizer.json"),
        (lambda content: content.update(added_tokens=[5]), "not a tokenizer.json"),
        (lambda content: content["model"].update(merges=5), "unusable tokenizer"),
        (lambda content: content["model"].update(vocab={"a": "b"}), "unusable tokenizer"),
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


@pytest.mark.parametrize("change", ["cut", "prefix space"])
def test_a_cut_that_has_no_name(change: str, tmp_path: Path) -> None:
    """The library reads it all the same; only a GGUF cannot say it."""
    path = tmp_path / "tokenizer.json"
    train(path, "deepseek-v3")
    content = json.loads(path.read_text())
    steps = content["pre_tokenizer"]["pretokenizers"]
    if change == "cut":
        steps[0]["pattern"]["Regex"] = "x"
    else:
        steps[-1]["add_prefix_space"] = True
    path.write_text(json.dumps(content))
    ours, peer = Tokenizer.from_file(path), tokenizers.Tokenizer.from_file(str(path))
    assert ours.encode("axb x", bos=False) == peer.encode("axb x", add_special_tokens=False).ids
    with pytest.raises(CheckpointError, match="GGUF has no name for"):
        written(ours, tmp_path)


def test_what_lies_beside(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    train(path, "qwen2")
    beside = tmp_path / "tokenizer_config.json"
    beside.write_text(json.dumps({"bos_token": None, "eos_token": {"content": EOS}}))
    bare = Tokenizer.from_file(tmp_path)
    assert (bare.bos_id, bare.eos_id, bare.add_bos, bare.chat_template) == (None, 1, False, None)
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": True, "chat_template": several}
    beside.write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    full = Tokenizer.from_file(tmp_path)
    assert (full.bos_id, full.add_bos, full.chat_template) == (0, True, "d")
    assert full.stop_ids == {1, 7}
    (tmp_path / "chat_template.jinja").write_text("j")
    assert Tokenizer.from_file(path).chat_template == "j"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="chat_template.jinja: .* expected text in UTF-8"):
        Tokenizer.from_file(path)
    beside.write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer_config.json: not JSON"):
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
