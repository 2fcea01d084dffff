"""llama.cpp, built by somebody else, reads what we write and says what we say."""

from pathlib import Path
from typing import Any

import pytest
import torch

import ktlab
from ktlab.checkpoint.writer import write_gguf
from ktlab.model.model import Model
from tests.model.llama import NEEDS_LLAMA_CPP, answers

pytestmark = NEEDS_LLAMA_CPP

PROMPTS = [
    "The old house stood at the end of the road",
    "def read_lines(path):\n    ",
    "Um eine Tabelle einzufügen, wählen Sie",
    "春風",
]


@pytest.fixture(scope="module")
def tiny() -> Model:
    return ktlab.load("tiny")


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
    completions = answers({tiny.checkpoint.path: PROMPTS})
    found = torch.tensor(
        [d for p, a in zip(PROMPTS, completions, strict=True) for d in differences(tiny, p, a)]
    )
    # llama.cpp rounds activations to 8 bits before each product with Q8_0 weights; we do not.
    assert found.median() < 0.03 and found.quantile(0.95) < 0.25


def test_in_float32_the_numbers_are_the_same(tiny: Model, tmp_path: Path) -> None:
    checkpoint = tiny.checkpoint
    tensors = {name: checkpoint.tensor(name).requantize("f32") for name in checkpoint.names()}
    path = write_gguf(tmp_path / "f32.gguf", checkpoint.config, tensors, checkpoint.tokenizer)
    completions = answers({path: PROMPTS[:2]})
    with tiny.override(backend="torch"):  # dequantized weights, activations not rounded
        found = [
            d for p, a in zip(PROMPTS, completions, strict=False) for d in differences(tiny, p, a)
        ]
    assert max(found) < 5e-3
