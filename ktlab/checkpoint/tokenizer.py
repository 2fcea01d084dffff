"""Text to token ids and back: byte-level BPE, built from what a GGUF or a tokenizer.json says.

The merging is done by the `tokenizers` library; here are only the rules that a GGUF names and
does not contain (how a text is cut before merging) and the care for partial and broken UTF-8.
"""

import codecs
import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from ktlab.checkpoint.pretokenizers import BYTE_CHARACTERS, CHARACTER_BYTES, PRE_TOKENIZERS
from ktlab.errors import CheckpointError, nearest, short

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of a GGUF (gguf-py `TokenType`)."""
END_OF_TURN = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>",
    "[EOS]", "[EOT]", "<end_of_turn>", "</s>",
)  # fmt: skip
"""Control tokens that end an answer whatever the file calls its EOS, as llama.cpp has it
(special_eog_ids in src/llama-vocab.cpp): a chat model's file may name the base model's."""


class Tokenizer:
    """Byte-level BPE over `tokens`; ids are positions in it.

    Control tokens (<bos> and the like) never arise from a text unless `special=True` is asked.
    `stop_ids` end a generation. `chat_template` is the Jinja source that came with the tokenizer.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        merges: Sequence[str | tuple[str, str]],
        *,
        pre: str,
        types: Sequence[int] | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
        add_bos: bool = True,
        stop_ids: Iterable[int] = (),
        chat_template: str | None = None,
        source: str = "tokenizer",
        bpe: "tokenizers.Tokenizer | None" = None,
    ) -> None:
        if bpe is None and pre not in PRE_TOKENIZERS:
            raise CheckpointError(
                f'{source}: pre-tokenizer "{pre}" is not known here{nearest(pre, PRE_TOKENIZERS)}; '
                f"known: {', '.join(PRE_TOKENIZERS)}; another one would cut texts differently"
            )
        self.tokens = list(tokens)
        self.types = list(types) if types is not None else [NORMAL] * len(self.tokens)
        self.merges = _pairs(merges, source)
        self.pre = pre
        self.bos_id, self.eos_id, self.add_bos = bos_id, eos_id, add_bos
        self.chat_template = chat_template
        stop_ids = list(stop_ids)
        self._check(source, stop_ids)
        self._special = {t: i for i, t in enumerate(self.tokens) if self.types[i] == CONTROL}
        known = {self._special[token] for token in END_OF_TURN if token in self._special}
        self.stop_ids = frozenset(known | set(stop_ids) | ({eos_id} - {None}))
        self._special_pattern = re.compile(
            "(" + "|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) + ")"
        )
        self._bpe = bpe if bpe is not None else self._build(source)

    def _check(self, source: str, stop_ids: list[int]) -> None:
        problems = []
        if len(self.types) != len(self.tokens):
            problems.append(f"{len(self.types)} token types for {len(self.tokens)} tokens")
        named = [("bos", self.bos_id), ("eos", self.eos_id), *(("stop", i) for i in stop_ids)]
        for label, token in named:
            valid = range(len(self.tokens))
            if token is not None and not (type(token) is int and token in valid):
                problems.append(f"{label} token {token!r} is outside 0..{len(self.tokens) - 1}")
        if problems:
            raise CheckpointError(f"{source}: unusable tokenizer: " + "; ".join(problems))

    def _build(self, source: str) -> tokenizers.Tokenizer:
        vocabulary: dict[str, int] = {}
        for i, token in enumerate(self.tokens):
            vocabulary.setdefault(token, i)
        try:
            bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=self.merges))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{source}: unusable tokenizer: {error}") from error
        pre = PRE_TOKENIZERS[self.pre]
        bpe.pre_tokenizer = pre.step()
        bpe.normalizer = pre.normalizer()
        bpe.add_tokens(
            [
                tokenizers.AddedToken(token, normalized=False)
                for token, kind in zip(self.tokens, self.types, strict=True)
                if kind == USER_DEFINED and token
            ]
        )
        return bpe

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any], source: str = "gguf") -> "Tokenizer":
        """From a GGUF's metadata (`tokenizer.ggml.*`), as plain Python values."""
        model = fields.get("tokenizer.ggml.model")
        if model != "gpt2":
            raise CheckpointError(
                f"{source}: tokenizer model {model!r} is not known here; usable: 'gpt2' "
                "(byte-level BPE), which DeepSeek, Kimi, Qwen and OLMo models use"
            )
        tokens, merges, types = _lists(fields, source)
        pre = str(fields.get("tokenizer.ggml.pre", "default"))
        template = fields.get("tokenizer.chat_template")
        ends = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))
        return cls(
            tokens,
            merges or [],
            pre=pre,
            types=types,
            bos_id=fields.get("tokenizer.ggml.bos_token_id"),
            eos_id=fields.get("tokenizer.ggml.eos_token_id"),
            # Where a file is silent, llama.cpp adds one for Llama 3's vocabulary only.
            add_bos=bool(fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")),
            stop_ids=[token for token in ends if token is not None],
            chat_template=template if isinstance(template, str) else None,
            source=source,
        )

    @classmethod
    def from_file(
        cls, path: str | Path, *, bos: str | None = None, eos: str | None = None
    ) -> "Tokenizer":
        """From a `tokenizer.json` of the `tokenizers` library, or the folder that holds one.

        What lies beside it counts too: `tokenizer_config.json` (BOS, EOS, chat template),
        `chat_template.jinja`, `generation_config.json` (what ends an answer). `bos` and `eos` name
        those tokens; where nothing does, common names are looked for.
        """
        from ktlab.checkpoint.tokenizer_json import read_tokenizer_json

        return cls(**read_tokenizer_json(Path(path), bos=bos, eos=eos))

    def padded(self, size: int) -> "Tokenizer":
        """With unused tokens up to `size`, as convert_hf_to_gguf.py adds them: an embedding may
        have more rows than its tokenizer has tokens, and a model may choose any of them."""
        if size <= self.vocab_size:
            return self
        padded = copy.copy(self)
        padded.tokens = self.tokens + [f"[PAD{i}]" for i in range(self.vocab_size, size)]
        padded.types = self.types + [UNUSED] * (size - self.vocab_size)
        return padded

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def encode(self, text: str | bytes, *, bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of `text`, after the BOS token if the model was trained with one.

        `special=True` reads control tokens written in the text ("<bos>") as such. Bytes that are
        no UTF-8, also those that Python keeps in a str as surrogates ("surrogateescape"), are
        read as U+FFFD, as Hugging Face's tokenizers are given them; decoding cannot bring them
        back.
        """
        text = valid_text(text)
        ids = [self.bos_id] if bos and self.add_bos and self.bos_id is not None else []
        parts = self._special_pattern.split(text) if special and self._special else [text]
        for part in parts:
            if special and part in self._special:
                ids.append(self._special[part])
            elif part:
                ids.extend(self._bpe.encode(part, add_special_tokens=False).ids)
        return ids

    def decode_bytes(self, ids: Iterable[int], *, special: bool = False) -> bytes:
        """The bytes of `ids`; control tokens are left out unless `special`."""
        return b"".join(self._token_piece(i, special) for i in ids)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, special=special).decode("utf-8", errors="replace")

    def pieces(self, ids: Iterable[int], *, special: bool = True) -> list[str]:
        """The text that each token adds; joined they are `decode(ids, special=special)`.

        A character spread over several tokens belongs to the token that completes it.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        pieces = [decoder.decode(self._token_piece(i, special)) for i in ids]
        if pieces:
            pieces[-1] += decoder.decode(b"", final=True)
        return pieces

    def _token_piece(self, token: int, special: bool) -> bytes:
        index = int(token)
        if not 0 <= index < len(self.tokens):
            raise CheckpointError(f"token {index} is outside the vocabulary of {self.vocab_size}")
        hidden = self.types[index] in (CONTROL, UNKNOWN, UNUSED) and not special
        return b"" if hidden else _token_bytes(self.tokens[index], self.types[index])

    def __repr__(self) -> str:
        return (
            f"Tokenizer({self.vocab_size} tokens, {len(self.merges)} merges, {self.pre}, "
            f"bos {self.bos_id}, eos {self.eos_id}"
            f"{', chat template' if self.chat_template else ''})"
        )


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """One token a byte, then <bos> and <eos>, then unused ones up to `vocab_size`."""
    if vocab_size < 258:
        raise CheckpointError(f"a byte tokenizer needs 258 tokens or more, found {vocab_size}")
    unused = [f"[UNUSED{i}]" for i in range(258, vocab_size)]
    return Tokenizer(
        [BYTE_CHARACTERS[byte] for byte in range(256)] + ["<bos>", "<eos>"] + unused,
        [],
        pre="gpt-2",
        types=[NORMAL] * 256 + [CONTROL] * 2 + [UNUSED] * len(unused),
        bos_id=256,
        eos_id=257,
    )


def valid_text(text: str | bytes) -> str:
    """`text` without what is no Unicode: broken UTF-8 and lone surrogates become U+FFFD."""
    if isinstance(text, bytes):
        return text.decode("utf-8", errors="replace")
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        pass
    try:
        return text.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace")
    except UnicodeEncodeError:  # surrogates that stand for no byte; pairs become one character
        return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")


def _lists(
    fields: Mapping[str, Any], source: str
) -> tuple[list[str], list[str] | None, list[int] | None]:
    """Tokens, merges and token types; what is none of its kind is refused, all together."""
    found: list[Any] = []
    problems = []
    text, number = (str, "texts"), (int, "whole numbers")
    for name, (kind, what) in {"tokens": text, "merges": text, "token_type": number}.items():
        key = f"tokenizer.ggml.{name}"
        values = fields.get(key)
        found.append(values)
        if values is None and name != "tokens":
            continue
        if not isinstance(values, list) or not {kind}.issuperset(map(type, values)):
            held = "is missing" if values is None else f"is {short(values)}"
            problems.append(f"{key} {held}, expected a list of {what}")
    if problems:
        raise CheckpointError(f"{source}: unusable tokenizer: " + "; ".join(problems))
    tokens, merges, types = found
    return tokens, merges, types


def _token_bytes(token: str, kind: int) -> bytes:
    if kind == NORMAL and all(character in CHARACTER_BYTES for character in token):
        return bytes(CHARACTER_BYTES[character] for character in token)
    return token.encode("utf-8", errors="replace")


def _pairs(merges: Sequence[str | tuple[str, str]], source: str) -> list[tuple[str, str]]:
    # A vocabulary has more than 100,000 of them: one comprehension, then one look at the lengths.
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else merge for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        wrong = next(merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2)
        raise CheckpointError(f"{source}: unusable tokenizer: {wrong!r} is no pair of tokens")
    return pairs  # type: ignore[return-value]
