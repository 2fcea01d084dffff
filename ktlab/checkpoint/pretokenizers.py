"""How a text is cut before byte-level BPE merges it, and how bytes are written as characters.

A GGUF only names its pre-tokenizer (`tokenizer.ggml.pre`); the rules themselves are here, as the
models' own tokenizer.json files have them. Where llama.cpp only comes near them, theirs count:
kimi-k2 splits words where the case changes (llama.cpp's own code does not), and qwen2 and olmo
compose characters first (NFC).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """Patterns applied in order, each isolating its matches in what the ones before left."""

    splits: tuple[str, ...]
    digits: bool = False
    """Every digit by itself, after the patterns."""
    nfc: bool = False
    """Characters are composed before anything else."""

    def step(self) -> pre_tokenizers.PreTokenizer:
        """For the `tokenizers` library; bytes become characters at the end."""
        splits = [pre_tokenizers.Split(Regex(s), behavior="isolated") for s in self.splits]
        digits = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*splits, *digits, byte_level])

    def normalizer(self) -> "normalizers.Normalizer | None":
        return normalizers.NFC() if self.nfc else None


# Source: deepseek-llm-7b's and DeepSeek-V2's tokenizer.json: letters that have a case.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293"
    "\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c"
    "\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5"
    "\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59"
    "\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee"
    "\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_LLM = (
    "[\r\n]",
    rf"\s?[{_CASED}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _CJK,
)
# Source: deepseek-coder-6.7b's tokenizer.json.
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK)
# Source: DeepSeek-V3's tokenizer.json; llama.cpp calls this "deepseek-v3" (src/llama-vocab.cpp).
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"""|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
# Source: GPT-2's encoder.py; also what ByteLevel(use_regex=True) of the library does.
_GPT2 = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Source: Qwen2's tokenizer.json (Qwen3's is the same).
_QWEN2 = (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",)
# Source: Llama 3's tokenizer.json; dbrx and OLMo 2 share the pattern.
_LLAMA3 = (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",)
# Source: `pat_str` of Kimi-K2's and Moonlight's tokenization files (tiktoken).
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_KIMI_K2 = (
    r"[\p{Han}]+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_REST}",
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "deepseek-v3": PreTokenizer(splits=_DEEPSEEK_V3),
    "deepseek-llm": PreTokenizer(splits=_DEEPSEEK_LLM, digits=True),
    "deepseek-coder": PreTokenizer(splits=_DEEPSEEK_CODER, digits=True),
    "kimi-k2": PreTokenizer(splits=_KIMI_K2),
    "gpt-2": PreTokenizer(splits=_GPT2),
    "olmo": PreTokenizer(splits=_GPT2, nfc=True),
    "qwen2": PreTokenizer(splits=_QWEN2, nfc=True),
    "deepseek-r1-qwen": PreTokenizer(splits=_QWEN2, nfc=True),
    "llama-bpe": PreTokenizer(splits=_LLAMA3),
    "dbrx": PreTokenizer(splits=_LLAMA3),
}
"""By the names that GGUF files carry. "olmo" is what OLMoE files say, "qwen2" Qwen3's."""


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte (encoder.py, bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


BYTE_CHARACTERS = _byte_characters()
CHARACTER_BYTES = {character: byte for byte, character in BYTE_CHARACTERS.items()}


def byte_level(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """Whether a tokenizer.json's pre-tokenizer turns bytes into characters."""
    return any(step.get("type") == "ByteLevel" for step in _steps(pre_tokenizer))


def pre_tokenizer_name(
    pre_tokenizer: Mapping[str, Any] | None, normalizer: Mapping[str, Any] | None = None
) -> str | None:
    """The name under which a GGUF knows what a tokenizer.json describes; None if it has none."""
    steps = _steps(pre_tokenizer)
    splits = tuple(s["pattern"].get("Regex", "") for s in steps if s.get("type") == "Split")
    if any(s.get("type") == "ByteLevel" and s.get("add_prefix_space") for s in steps):
        return None
    if not splits and any(s.get("type") == "ByteLevel" and s.get("use_regex", True) for s in steps):
        splits = _GPT2
    found = PreTokenizer(
        splits=_spelled(splits),
        digits=any(s.get("type") == "Digits" and s.get("individual_digits") for s in steps),
        nfc=any(s.get("type") == "NFC" for s in _steps(normalizer, "normalizers")),
    )
    for name, known in PRE_TOKENIZERS.items():
        if replace(known, splits=_spelled(known.splits)) == found:
            return name
    return None


def _spelled(splits: tuple[str, ...]) -> tuple[str, ...]:
    """Patterns in one spelling: a quote needs no backslash, a line end can be itself or escaped."""
    table = {r"\"": '"', "\r": r"\r", "\n": r"\n"}
    for found, meant in table.items():
        splits = tuple(split.replace(found, meant) for split in splits)
    return splits


def _steps(
    described: Mapping[str, Any] | None, inner: str = "pretokenizers"
) -> list[Mapping[str, Any]]:
    """The steps of a sequence, or the only one."""
    described = described or {}
    return list(described.get(inner, [described] if described else []))
