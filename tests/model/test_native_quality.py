"""What native kernels cost in quality, end to end: activations rounded to 8 bits, nothing else.

The judge is the same file with its weights dequantized to float32 (backend "torch").
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ktlab
from ktlab.checkpoint.names import is_quantizable
from ktlab.checkpoint.writer import write_gguf
from ktlab.kernels import native
from ktlab.model.model import Model
from ktlab.quantization import fallback_format
from tests.model.llama import answers
from tests.model.test_llama_cpp import PROMPTS

pytestmark = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())

KL_BOUND = 1e-3
"""Mean over texts of all domains. Most tokens lose a tenth of it (the median is asserted, too):
the mean is that of the few whose experts change when an activation is rounded."""
LAYOUTS = ("ggml_blocks", "packed")


@pytest.fixture(scope="module")
def tiny() -> Model:
    return ktlab.load("tiny")


def logprobs(model: Model, ids: list[int], **words: str) -> Tensor:
    with model.override(**words):
        return model.forward(ids).log_softmax(-1).double()


def q4_k_m(name: str) -> str:
    """llama.cpp's mixture, in short: the output and every second `down` in 6 bits."""
    if name == "output.weight" or "attn_v_b" in name:
        return "q6_k"
    return "q6_k" if "ffn_down" in name and int(name.split(".")[1]) % 2 else "q4_k"


@pytest.fixture(scope="module")
def mixed(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as a Q4_K_M file; its rows of 96 fall back to q5_0 and q8_0."""
    checkpoint = tiny.checkpoint
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    for name, tensor in tensors.items():
        if is_quantizable(name, tensor.shape):
            format = fallback_format(q4_k_m(name), tensor.shape[-1])
            tensors[name] = tensor.requantize(format)
    path = tmp_path_factory.mktemp("q4_k_m") / "tiny-q4_k_m.gguf"
    return write_gguf(path, checkpoint.config, tensors, checkpoint.tokenizer)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("file", "median"), [("tiny", KL_BOUND / 10), ("mixed", KL_BOUND / 5)])
def test_native_kernels_cost_little_on_every_kind_of_text(
    file: str, median: float, layout: str, tiny: Model, mixed: Path
) -> None:
    model = ktlab.load(mixed) if file == "mixed" else tiny
    found = []
    for text in ktlab.domain_texts().values():
        ids = model.tokenizer.encode(text[:2000])[:200]
        exact = logprobs(model, ids, backend="torch")
        found.append((exact.exp() * (exact - logprobs(model, ids, layout=layout))).sum(-1))
    kl = torch.cat(found)
    assert kl.mean() < KL_BOUND and kl.median() < median


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None,
    reason="xllamacpp (llama.cpp as a wheel) is not installed: pip install xllamacpp",
)
def test_a_q4_k_m_file_loses_no_more_than_in_llama_cpp(mixed: Path) -> None:
    model = ktlab.load(mixed)
    ours, theirs = [], []
    for prompt, answer in zip(PROMPTS, answers({mixed: PROMPTS}), strict=True):
        ids = model.tokenizer.encode(prompt)
        steps = answer["choices"][0]["logprobs"]["content"]
        ids_T = [*ids, *(step["id"] for step in steps)]
        exact = logprobs(model, ids_T, backend="torch")[len(ids) - 1 :]
        found = logprobs(model, ids_T)[len(ids) - 1 :]
        for place, step in enumerate(steps):
            top = torch.tensor([t["id"] for t in step["top_logprobs"]])
            said = torch.tensor([t["logprob"] for t in step["top_logprobs"]]).double()
            # llama.cpp lists the likeliest tokens only: compared on those, weighted by likelihood.
            weight = exact[place][top].exp()
            ours.append(float((weight * (exact[place][top] - found[place][top]).abs()).sum()))
            theirs.append(float((weight * (exact[place][top] - said).abs()).sum()))
    assert len(ours) >= 40
    assert torch.tensor(ours).mean() < 1.1 * torch.tensor(theirs).mean()


def test_a_q4_k_m_file_is_computed_by_native_kernels_throughout(mixed: Path) -> None:
    model = ktlab.load(mixed)
    assert set(model.settings.formats["experts"].split("+")) == {"q4_k", "q5_0", "q8_0"}
    kernels = [bank.kernel for bank in model.experts]
    assert {kernel.backend for kernel in kernels} == {"native"}
    assert all("native" in text for text in model.settings.matrices.values())
    assert "torch" not in " ".join(model.settings.matrices.values())
