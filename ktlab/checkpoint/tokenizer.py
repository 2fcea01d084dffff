"""Text to token ids and back: byte-level BPE, built from what a GGUF file says of it.

The merging is done by the `tokenizers` library; here are only the rules that a GGUF names and
does not contain (how a text is cut before merging) and the care for partial UTF-8.
"""

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, pre_tokenizers

from ktlab.checkpoint.pretokenizers import (
    BYTE_CHARACTERS,
    CHARACTER_BYTES,
    PRE_TOKENIZERS,
    pre_tokenizer_name,
)
from ktlab.errors import CheckpointError, nearest

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of a GGUF (gguf-py `TokenType`)."""


class Tokenizer:
    """Byte-level BPE over `tokens`; ids are positions in it.

    Control tokens (<bos> and the like) never arise from a text unless `special=True` is asked.
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
        source: str = "tokenizer",
    ) -> None:
        if pre not in PRE_TOKENIZERS:
            raise CheckpointError(
                f'{source}: pre-tokenizer "{pre}" is not known here{nearest(pre, PRE_TOKENIZERS)}; '
                f"known: {', '.join(PRE_TOKENIZERS)}; another one would cut texts differently"
            )
        self.tokens = list(tokens)
        self.types = list(types) if types is not None else [NORMAL] * len(self.tokens)
        self.merges = [_pair(merge, source) for merge in merges]
        self.pre = pre
        self.bos_id, self.eos_id, self.add_bos = bos_id, eos_id, add_bos
        self._check(source)
        self._special = {t: i for i, t in enumerate(self.tokens) if self.types[i] == CONTROL}
        self._special_pattern = re.compile(
            "(" + "|".join(map(re.escape, sorted(self._special, key=len, reverse=True))) + ")"
        )
        self._bytes = [_token_bytes(t, k) for t, k in zip(self.tokens, self.types, strict=True)]
        self._bpe = self._build(source)

    def _check(self, source: str) -> None:
        problems = []
        if len(self.types) != len(self.tokens):
            problems.append(f"{len(self.types)} token types for {len(self.tokens)} tokens")
        for label, token in (("bos", self.bos_id), ("eos", self.eos_id)):
            valid = range(len(self.tokens))
            if token is not None and not (isinstance(token, int) and token in valid):
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
        splits = [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated")
            for pattern in PRE_TOKENIZERS[self.pre]
        ]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
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
                "(byte-level BPE), which the DeepSeek family uses"
            )
        tokens = fields.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise CheckpointError(f"{source}: tokenizer.ggml.tokens is missing or not text")
        return cls(
            tokens,
            fields.get("tokenizer.ggml.merges") or [],
            pre=str(fields.get("tokenizer.ggml.pre", "default")),
            types=fields.get("tokenizer.ggml.token_type"),
            bos_id=fields.get("tokenizer.ggml.bos_token_id"),
            eos_id=fields.get("tokenizer.ggml.eos_token_id"),
            add_bos=bool(fields.get("tokenizer.ggml.add_bos_token", True)),
            source=source,
        )

    @classmethod
    def from_file(
        cls, path: str | Path, *, bos: str | None = None, eos: str | None = None
    ) -> "Tokenizer":
        """From a `tokenizer.json` of the `tokenizers` library.

        `bos` and `eos` name those tokens; without them, common names are looked for.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            kind = content["model"].get("type", "BPE")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path.name}: not a tokenizer.json: {error}") from error
        if kind != "BPE":
            raise CheckpointError(f"{path.name}: tokenizer model {kind}, expected byte-level BPE")
        added = content.get("added_tokens", [])
        vocabulary = dict(content["model"]["vocab"]) | {t["content"]: t["id"] for t in added}
        kinds = {t["id"]: CONTROL if t["special"] else USER_DEFINED for t in added}
        by_id = {i: token for token, i in vocabulary.items()}
        size = max(by_id) + 1
        tokens = [by_id.get(i, f"[UNUSED{i}]") for i in range(size)]
        types = [kinds.get(i, NORMAL if i in by_id else UNUSED) for i in range(size)]

        def special(given: str | None, pattern: str) -> int | None:
            if given is not None:
                if given not in vocabulary:
                    raise CheckpointError(
                        f'{path.name}: no token "{given}"{nearest(given, vocabulary)}'
                    )
                return vocabulary[given]
            names = [t["content"] for t in added if re.search(pattern, t["content"], re.I)]
            return vocabulary[names[0]] if names else None

        return cls(
            tokens,
            [tuple(m) if isinstance(m, list) else m for m in content["model"]["merges"]],
            pre=pre_tokenizer_name(content.get("pre_tokenizer"), path.name),
            types=types,
            bos_id=special(bos, r"bos|begin.of.sentence|begin.of.text|^<s>$"),
            eos_id=special(eos, r"eos|end.of.sentence|end.of.text|endoftext|^</s>$"),
            source=path.name,
        )

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def encode(self, text: str, *, bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of `text`, after the BOS token if the model was trained with one.

        `special=True` reads control tokens written in the text ("<bos>") as such.
        """
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
        return b"" if hidden else self._bytes[index]

    def __repr__(self) -> str:
        return (
            f"Tokenizer({self.vocab_size} tokens, {len(self.merges)} merges, {self.pre}, "
            f"bos {self.bos_id}, eos {self.eos_id})"
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


def _token_bytes(token: str, kind: int) -> bytes:
    if kind == NORMAL and all(character in CHARACTER_BYTES for character in token):
        return bytes(CHARACTER_BYTES[character] for character in token)
    return token.encode("utf-8", errors="replace")


def _pair(merge: "str | tuple[str, str]", source: str) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if len(parts) != 2:
        raise CheckpointError(f"{source}: unusable tokenizer: {merge!r} is no pair of tokens")
    return parts[0], parts[1]
