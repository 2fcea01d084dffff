"""The training recipe on a toy corpus: tokenizer, training, going on after a stop, export."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ktlab

RECIPE = Path(__file__).resolve().parents[1] / "data" / "recipe"


def run(script: str, *options: object) -> str:
    # Without fusing: compiling the passes would take longer than the few steps.
    environment = {**os.environ, "KTLAB_FUSE": "0"}
    command = [sys.executable, str(RECIPE / f"{script}.py"), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def steps(log: Path) -> list[dict[str, float]]:
    return [
        line for line in map(json.loads, log.read_text().splitlines()) if "bits_per_byte" in line
    ]


@pytest.mark.slow
def test_recipe_from_text_to_a_loaded_model(tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "train"
    corpus.mkdir()
    for name, text in ktlab.domain_texts().items():
        (corpus / f"{name}.train.txt").write_text(text[:60_000], encoding="utf-8")
        (corpus / f"{name}.heldout.txt").write_text(text[-2_000:], encoding="utf-8")
    run("tokenizer", "--corpus", corpus)
    train = ("--corpus", corpus, "--out", out, "--blocks", 1, "--device", "cpu")
    run("train", *train, "--tokens", 3_000)
    first = torch.load(out / "last.pt", weights_only=True)
    run("train", *train, "--tokens", 6_000)
    second = torch.load(out / "last.pt", weights_only=True)
    # It went on: more steps and tokens, and the rows before are not read again.
    assert 0 < first["step"] < second["step"]
    assert second["tokens"] > first["tokens"]
    assert [line["step"] for line in steps(out / "log.jsonl")] == [first["step"], second["step"]]
    assert not torch.equal(first["model"]["head"], second["model"]["head"])

    path = tmp_path / "toy.gguf"
    run("export", out / "last.pt", "--out", path, "--format", "f32",
        "--tokenizer", corpus / "tokenizer.json")  # fmt: skip
    model = ktlab.load(path)
    ids = np.load(corpus / "python.heldout.npy")[:200].astype(np.int64)
    sys.path.insert(0, str(RECIPE))
    try:
        from model import Config, TinyModel  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(RECIPE))
    trained = TinyModel(Config(**second["config"]))
    trained.load_state_dict(second["model"])
    with torch.no_grad():
        expected = trained.float().eval().logits(torch.from_numpy(ids)[None])[0]
    found = model.forward(ids)
    assert float((found - expected).norm() / expected.norm()) < 1e-3
