"""Tokenizers as Hugging Face has them: the library alone, from the published definitions.

The vocabularies are trained here on the embedded texts; the steps before merging are those of the
models' tokenizer.json files, written as they write them.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from ktlab.checkpoint.embedded import data_path
from ktlab.checkpoint.pretokenizers import _CASED

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TOOL = "<tool>"
"""An added token that is no control token: found in any text."""

HARD_TEXT = (
    "def f(x):\n    return x + 12345678901234567890  # größer, 3.14159e-10, 0xDEADBEEF\r\n\r\n"
    "Привет, мир! été naïve Ångström İstanbul Ελλάδα ΟΔΥΣΣΕΥΣ · 漢字とカタカナ、ひらがな。"
    "한국어 텍스트 हिन्दी में लिखा مرحبا بالعالم עברית ไทย 中文混English混排123与４５６\u3000全角。\n"
    "🙂 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ↔️ ①②½Ⅷ٣ \u200b\u00a0\u2028 \t\t tabs\n   \n  \n\n   trailing   \n"
    "don't I'LL we've it's 'sss ''' \"q\" `c` a_b-c/d\\e http://x.y/z?a=b&c=%20 <html></html>\n"
    "#include <stdio.h>\nint main(void) { return a->b[i++] ^ ~c; }\n//----====____\n"
    "\ufffd\x00\x7f end "
)
CAMEL = "getUserName iPhone HTTPServer MacBookPro's ÄÖÜäöü ßẞ ǅaleko"


def _split(pattern: str) -> dict[str, Any]:
    regex = {"Regex": pattern}
    return {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex
    }  # fmt: skip


_DIGITS = {"type": "Digits", "individual_digits": True}
_CJK = _split("[一-龥ࠀ-一가-퟿]+")
_LETTERS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_APOSTROPHE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
STEPS: dict[str, list[dict[str, Any]]] = {
    "deepseek-llm": [
        _split("[\r\n]"), _split(rf"\s?[{_CASED}]+"),
        _split("\\s?[!-/:-~！-／：-～‘-‟　-。]+"), _split(r"\s+$"), _CJK, _DIGITS,
        _byte_level(False),
    ],
    "deepseek-coder": [
        _split("[\r\n]"), _split(r"\s?\p{L}+"), _split(r"\s?\p{P}+"), _CJK, _DIGITS,
        _byte_level(False),
    ],
    "deepseek-v3": [
        _split(r"\p{N}{1,3}"), _split("[一-龥぀-ゟ゠-ヿ]+"),
        _split(
            "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?"
            "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
        ),
        _byte_level(False),
    ],
    "kimi-k2": [
        _split(
            rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{_LETTERS}*{_SMALL}+{_APOSTROPHE}?"
            rf"|[^\r\n\p{{L}}\p{{N}}]?{_LETTERS}+{_SMALL}*{_APOSTROPHE}?|\p{{N}}{{1,3}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        _byte_level(False),
    ],
    "gpt-2": [_byte_level(True)],
    "olmo": [_byte_level(True)],
    "qwen2": [
        _split(
            rf"{_APOSTROPHE}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        _byte_level(False),
    ],
}  # fmt: skip
COMPOSED = ("olmo", "qwen2")
"""Their tokenizer.json normalises to NFC."""


def train(path: Path, pre: str, size: int = 272, characters: int = 2000) -> tokenizers.Tokenizer:
    """A tokenizer.json made by the `tokenizers` library alone, and what it makes of it."""
    empty: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "NFC"} if pre in COMPOSED else None,
        "pre_tokenizer": STEPS[pre][0]
        if len(STEPS[pre]) == 1
        else {"type": "Sequence", "pretokenizers": STEPS[pre]},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    peer = tokenizers.Tokenizer.from_str(json.dumps(empty))
    assert isinstance(peer.model, models.BPE)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = sorted(data_path("texts").glob("*.txt"))
    samples = [text.read_text(encoding="utf-8")[:characters] for text in texts]
    peer.train_from_iterator([HARD_TEXT * 3, CAMEL * 3, *samples], trainer)
    peer.add_tokens([tokenizers.AddedToken(TOOL, normalized=False)])
    peer.save(str(path))
    return peer
