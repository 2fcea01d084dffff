"""Train the embedded model's tokenizer on the corpus, and encode the corpus with it.

    python data/recipe/tokenizer.py [--corpus .build/corpus] [--vocabulary 4096] [--force]

A byte-level BPE with DeepSeek-V3's pre-tokenizer, so that llama.cpp knows it by name
(``deepseek-v3``). Writes ``tokenizer.json`` and, for every ``<name>.txt`` of the corpus, the token
ids of its documents as ``<name>.npy`` (uint16, one dimension, each document after a BOS).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from corpus import DOMAINS, NUL
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
SPECIAL_TOKENS = [BOS, EOS, PAD]  # ids 0, 1 and 2
SAMPLE_BYTES = 3_000_000
"""Training text taken from each domain: as much from all, or the largest would own the merges."""

# The three splits are llama.cpp's `deepseek-v3`, in this order; a change here needs another name.
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+",
)


def documents(path: Path) -> list[str]:
    """The documents of a corpus file."""
    return path.read_text(encoding="utf-8").split(NUL)


def sample(corpus: Path) -> Iterator[str]:
    """Yield the same amount of training text from every domain (the files are shuffled)."""
    for domain in DOMAINS:
        size = 0
        for document in documents(corpus / f"{domain}.train.txt"):
            yield document
            size += len(document.encode())
            if size > SAMPLE_BYTES:
                break


def train(corpus: Path, vocabulary: int) -> Tokenizer:
    """Train the tokenizer on a balanced sample of the training text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in DEEPSEEK_V3]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(corpus), trainer)
    assert tokenizer.get_vocab_size() == vocabulary
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Encode documents as one array of token ids, with a BOS before each."""
    bos = tokenizer.token_to_id(BOS)
    ids: list[np.ndarray] = []
    for start in range(0, len(texts), 256):
        for encoding in tokenizer.encode_batch(texts[start : start + 256]):
            ids.append(np.array([bos, *encoding.ids], dtype=np.uint16))
    return np.concatenate(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--corpus", type=Path, default=Path(".build/corpus"))
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--force", action="store_true", help="train and encode again")
    arguments = parser.parse_args()
    corpus: Path = arguments.corpus

    saved = corpus / "tokenizer.json"
    fresh = arguments.force or not saved.exists()
    if fresh:
        train(corpus, arguments.vocabulary).save(str(saved))
    tokenizer = Tokenizer.from_file(str(saved))

    print(f"{'domain':<12}{'train tokens':>14}{'held-out tokens':>17}{'bytes/token':>13}")
    for domain in DOMAINS:
        counts = []
        for part in ("train", "heldout"):
            source = corpus / f"{domain}.{part}.txt"
            target = source.with_suffix(".npy")
            if fresh or not target.exists():
                np.save(target, encode(tokenizer, documents(source)))
            counts.append(int(np.load(target, mmap_mode="r").size))
        size = (corpus / f"{domain}.heldout.txt").stat().st_size
        print(f"{domain:<12}{counts[0]:>14,}{counts[1]:>17,}{size / counts[1]:>13.2f}", flush=True)


if __name__ == "__main__":
    main()
