"""llama.cpp, built by somebody else, reads what we write and says what we say.

xllamacpp is a wheel of llama.cpp's own server code; it runs in a process of its own.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ktlab
from ktlab.checkpoint.writer import write_gguf
from ktlab.model.model import Model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None,
    reason="xllamacpp (llama.cpp as a wheel) is not installed: pip install xllamacpp",
)

RUN = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers = 512, 1, False, 0
params.cpuparams.n_threads = 2
server = xllamacpp.Server(params)
for prompt in json.loads(sys.argv[2]):
    request = dict(prompt=prompt, max_tokens=12, n_predict=12, temperature=0.0, n_probs=8,
                   logprobs=8, cache_prompt=False, ignore_eos=True)
    print("ANSWER", json.dumps(server.handle_completions(request)))
"""
PROMPTS = [
    "The old house stood at the end of the road",
    "def read_lines(path):\n    ",
    "Um eine Tabelle einzufügen, wählen Sie",
    "春風",
]


@pytest.fixture(scope="module")
def tiny() -> Model:
    return ktlab.load("tiny")


def llama_cpp(path: Path, prompts: list[str]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path), json.dumps(prompts)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert len(lines) == len(prompts), done.stderr[-2000:]
    return [json.loads(line.removeprefix("ANSWER")) for line in lines]


def differences(model: Model, prompt: str, answer: dict[str, Any]) -> list[float]:
    """|ours - theirs| of the log-probabilities llama.cpp lists, along the text it wrote."""
    ids = model.tokenizer.encode(prompt)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    steps = answer["choices"][0]["logprobs"]["content"]
    written = [step["id"] for step in steps]
    logprobs = model.forward([*ids, *written]).log_softmax(-1)[len(ids) - 1 :]
    return [
        abs(float(logprobs[place, top["id"]]) - top["logprob"])
        for place, step in enumerate(steps)
        for top in step["top_logprobs"]
    ]


def test_the_embedded_file_is_read_unchanged(tiny: Model) -> None:
    assert tiny.checkpoint.path is not None
    answers = llama_cpp(tiny.checkpoint.path, PROMPTS)
    found = torch.tensor(
        [d for p, a in zip(PROMPTS, answers, strict=True) for d in differences(tiny, p, a)]
    )
    # llama.cpp rounds activations to 8 bits before each product with Q8_0 weights; we do not.
    assert found.median() < 0.03 and found.quantile(0.95) < 0.25


def test_in_float32_the_numbers_are_the_same(tiny: Model, tmp_path: Path) -> None:
    checkpoint = tiny.checkpoint
    tensors = {name: checkpoint.tensor(name).requantize("f32") for name in checkpoint.names()}
    path = write_gguf(tmp_path / "f32.gguf", checkpoint.config, tensors, checkpoint.tokenizer)
    answers = llama_cpp(path, PROMPTS[:2])
    with tiny.override(backend="torch"):  # dequantized weights, activations not rounded
        found = [d for p, a in zip(PROMPTS, answers, strict=False) for d in differences(tiny, p, a)]
    assert max(found) < 5e-3
