"""Train the tiny model: one command, on a CPU or a GPU, which goes on where it was killed.

    python data/recipe/train.py --minutes 90

reads `.build/corpus`, writes a checkpoint every few minutes and a log of JSON lines to
`.build/train`. The schedule follows the share of the budget spent, in minutes of training or in
tokens, so a busy machine ends with less text seen but with the rate decayed all the same.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model import Config, TinyModel
from muon import Muon
from torch import Tensor

DOMAINS = ("english", "dictionary", "python", "c", "german", "russian", "chinese")
BOS = 0
BLOCK = 512  # tokens drawn together; a sequence is a block, or early in training half of one


def keep_pages() -> None:
    """Start again with an allocator that holds on to memory, in huge pages.

    Otherwise every large intermediate result is returned to the system and faulted in anew.
    """
    wanted = {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "MALLOC_TOP_PAD_": str(256 << 20),
        "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192",  # compiled products, one a shape
    }
    if sys.platform == "linux" and "MALLOC_TOP_PAD_" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)


def compute_on(device: torch.device) -> torch.dtype:
    """bfloat16, but float32 on a CPU without products of it: those take twelve times as long."""
    emulated = device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if emulated else torch.bfloat16


class Corpus:
    """Token ids of every domain, and how many bytes each id stands for."""

    def __init__(self, folder: Path) -> None:
        self.train = {d: np.load(folder / f"{d}.train.npy", mmap_mode="r") for d in DOMAINS}
        self.heldout = {d: np.load(folder / f"{d}.heldout.npy", mmap_mode="r") for d in DOMAINS}
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        self.bytes_V = torch.zeros(Config().vocab, dtype=torch.long)
        for token, index in tokenizer["model"]["vocab"].items():
            self.bytes_V[index] = len(token)  # a byte-level vocabulary: one letter, one byte
        for special in tokenizer["added_tokens"]:
            self.bytes_V[special["id"]] = 0

    def blocks(self, domain: str, first: int, count: int) -> np.ndarray[Any, Any]:
        """Training blocks with the token after each, [count, BLOCK + 1].

        Blocks are numbered through all epochs; each epoch shifts and shuffles them anew.
        """
        ids = self.train[domain]
        per_epoch = len(ids) // BLOCK - 2
        rows = []
        for number in range(first, first + count):
            epoch, place = divmod(number, per_epoch)
            rng = np.random.default_rng([epoch, DOMAINS.index(domain)])
            start = rng.integers(BLOCK) + rng.permutation(per_epoch)[place] * BLOCK
            rows.append(ids[start : start + BLOCK + 1])
        return np.stack(rows)

    def batch(self, step: int, blocks: int, length: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets, [B, length]: as many blocks of every domain.

        Every sequence begins with BOS in place of its first token, as at inference.
        """
        drawn = np.concatenate([self.blocks(d, step * blocks, blocks) for d in DOMAINS])
        ids = torch.from_numpy(drawn.astype(np.int64))
        tokens_BS = ids[:, :-1].reshape(-1, length).clone()
        tokens_BS[:, 0] = BOS
        return tokens_BS, ids[:, 1:].reshape(-1, length)

    def bits_per_byte(
        self, model: TinyModel, windows: int, rows: int, device: torch.device
    ) -> dict[str, float]:
        """Of `windows` stretches of BLOCK tokens, spread evenly over each domain's held-out text.

        They go through the model `rows` at a time, in a training batch's shape and with gradients
        on: anything else would have every fused function compiled once more.
        """
        result = {}
        model.eval()
        for domain, ids in self.heldout.items():
            count = min(windows, (len(ids) - 1) // BLOCK)
            starts = np.linspace(0, len(ids) - BLOCK - 1, count).astype(int)
            drawn = np.stack([ids[s : s + BLOCK + 1] for s in starts]).astype(np.int64)
            bits, size = 0.0, 0
            for part in torch.from_numpy(drawn).split(rows):
                tokens_BS, target_BS = part[:, :-1].clone(), part[:, 1:]
                tokens_BS[:, 0] = BOS
                loss_T = model.losses(tokens_BS.to(device), target_BS.to(device)).detach().cpu()
                size_T = self.bytes_V[target_BS.flatten()]
                bits += float(loss_T[size_T > 0].double().sum()) / math.log(2)
                size += int(size_T.sum())
            result[domain] = bits / size
        model.train()
        return result


def schedule(progress: float) -> tuple[float, int]:
    """Share of the peak rates and sequence length at a share of the budget spent.

    A constant rate, then a long linear decay to zero, which does much of the work; short
    sequences first, where attention is cheap and long context still teaches little.
    """
    return min(1.0, (1 - progress) / 0.6), BLOCK // 2 if progress < 0.35 else BLOCK


def balance(model: TinyModel, rate: float) -> dict[str, Any]:
    """Nudge every expert's selection bias towards even load; report how even it was."""
    entropy, violation = [], []
    for _, mixture in model.mixtures():
        share_E = mixture.load_E / mixture.load_E.sum()
        mixture.bias_E += rate * torch.sign(1 / len(share_E) - share_E)
        mixture.load_E.zero_()
        entropy.append(-float((share_E * share_E.clamp_min(1e-9).log2()).sum()))
        violation.append(float(share_E.max() * len(share_E) - 1))
    return {"load_entropy": min(entropy), "max_violation": max(violation)}


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write aside, then rename: a kill leaves the old checkpoint or the new one, whole."""
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def rounded(values: Mapping[str, Any], digits: int = 4) -> dict[str, Any]:
    return {k: round(v, digits) if isinstance(v, float) else v for k, v in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, help="budget of training time (default: 90)")
    parser.add_argument("--tokens", type=float, help="budget of tokens, instead of minutes")
    parser.add_argument("--corpus", type=Path, default=Path(".build/corpus"))
    parser.add_argument("--out", type=Path, default=Path(".build/train"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=2, help="of 512 tokens, a domain and step")
    parser.add_argument("--evaluate-every", type=int, default=250, metavar="STEPS")
    parser.add_argument("--save-minutes", type=float, default=3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    minutes = args.minutes or (math.inf if args.tokens else 90.0)

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    corpus = Corpus(args.corpus)
    model = TinyModel(Config()).to(device)
    optimiser = Muon(model, compute_on(device))
    args.out.mkdir(parents=True, exist_ok=True)
    last = args.out / "last.pt"
    step, tokens, spent = 0, 0, 0.0
    if last.exists():
        saved = torch.load(last, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        step, tokens, spent = saved["step"], saved["tokens"], saved["seconds"]

    def content() -> dict[str, Any]:
        return {
            "config": asdict(model.c),
            "model": model.state_dict() | optimiser.master,
            "optimiser": optimiser.state_dict(),
            "step": step,
            "tokens": tokens,
            "seconds": spent,
        }

    log = (args.out / "log.jsonl").open("a", buffering=1)
    saved_at = time.monotonic()
    begun = saved_at - spent
    average, first = 0.0, step
    while True:
        spent = time.monotonic() - begun
        progress = max(spent / 60 / minutes, tokens / (args.tokens or math.inf))
        done = progress >= 1
        if done or step % args.evaluate_every == 0 and step > first:
            rows = args.blocks * len(DOMAINS)
            bits = corpus.bits_per_byte(model, rows * (5 if done else 1), rows, device)
            bits = {"macro": sum(bits.values()) / len(bits)} | bits
            log.write(json.dumps({"step": step, "bits_per_byte": rounded(bits)}) + "\n")
        if done or time.monotonic() - saved_at > args.save_minutes * 60:
            save(last, content())
            saved_at = time.monotonic()
        if done:
            break

        scale, length = schedule(progress)
        tokens_BS, target_BS = corpus.batch(step, args.blocks, length)
        loss = model.losses(tokens_BS.to(device), target_BS.to(device)).mean()
        loss.backward()
        warm = min(1.0, (step + 1) / 40)
        optimiser.step(scale * warm, 0.85 + 0.1 * min(1.0, step / 300))
        # The bias follows the rate down and rests at the end, when the experts should settle.
        load = balance(model, 0.002 * scale if progress < 0.95 else 0.0)
        step, tokens = step + 1, tokens + tokens_BS.numel()
        average = loss.item() if step == first + 1 else 0.95 * average + 0.05 * loss.item()
        assert math.isfinite(average), f"the loss is not finite at step {step}"
        if step % 10 == 0:
            seconds = time.monotonic() - begun
            line = {"step": step, "tokens": tokens, "seconds": seconds, "loss": average}
            log.write(json.dumps(rounded(line | load | {"rate": scale * warm})) + "\n")


if __name__ == "__main__":
    keep_pages()
    main()
