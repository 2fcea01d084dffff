"""How a text is cut before byte-level BPE merges it, and how bytes are written as characters.

A GGUF only names its pre-tokenizer (`tokenizer.ggml.pre`); the rules themselves are here.
"""

from collections.abc import Mapping
from typing import Any

from ktlab.errors import CheckpointError

# Source: DeepSeek-V3's tokenizer.json; llama.cpp calls this "deepseek-v3" (src/llama-vocab.cpp).
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"""|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
# Source: GPT-2's encoder.py.
_GPT2 = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)

PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "deepseek-v3": _DEEPSEEK_V3,
    "gpt-2": _GPT2,
}
"""How a text is cut before merging: patterns applied in order, each isolating its matches."""


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte (encoder.py, bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


BYTE_CHARACTERS = _byte_characters()
CHARACTER_BYTES = {character: byte for byte, character in BYTE_CHARACTERS.items()}


def pre_tokenizer_name(pre_tokenizer: Mapping[str, Any] | None, source: str) -> str:
    """Which known pre-tokenizer a tokenizer.json describes."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    # A quote means the same in a pattern with and without a backslash.
    patterns = tuple(
        step["pattern"].get("Regex", "").replace(r"\"", '"')
        for step in steps
        if step.get("type") == "Split"
    )
    if any(s.get("type") == "ByteLevel" and s.get("add_prefix_space") for s in steps):
        raise CheckpointError(f"{source}: it puts a space before texts, which a GGUF cannot say")
    if not patterns and any(s.get("type") == "ByteLevel" and s.get("use_regex") for s in steps):
        return "gpt-2"
    for name, known in PRE_TOKENIZERS.items():
        if patterns == known:
            return name
    raise CheckpointError(
        f"{source}: it cuts texts by {patterns}, which is none of {', '.join(PRE_TOKENIZERS)}"
    )
