"""A small chat model: random weights, one token a byte, a template with turns and an end."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ktlab.checkpoint import chat_template_child
from ktlab.checkpoint.chat_template import ChatTemplate
from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.checkpoint.tokenizer import Tokenizer, byte_tokenizer
from ktlab.checkpoint.writer import write_gguf
from ktlab.model.load import load
from ktlab.model.model import Model

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role[0] }}]"
    "{{ m.content.split('</think>')[-1] }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _rendered_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates in this process: tests/checkpoint/test_chat_template.py has the other one."""

    def render(self, messages, add_generation_prompt=True, **variables):
        context = {**self.variables, **variables, "messages": messages}
        context["add_generation_prompt"] = add_generation_prompt
        return chat_template_child.render(self.source, context, 10_000)

    monkeypatch.setattr(ChatTemplate, "render", render)


def tokenizer(template: str | None = TEMPLATE, eos_id: int | None = 257) -> Tokenizer:
    bytes_ = byte_tokenizer(TINY_TEST_CONFIG.vocab_size)
    return Tokenizer(
        bytes_.tokens, [], pre="gpt-2", types=bytes_.types, bos_id=256, eos_id=eos_id,
        chat_template=template,
    )  # fmt: skip


def write(path: Path, template: str | None = TEMPLATE, eos_id: int | None = 257) -> Path:
    checkpoint = synthesize(TINY_TEST_CONFIG, seed=0)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    # A logit of 0 is never the greatest: no greedy answer ends by itself, on any processor.
    output = tensors["output.weight"]
    blocks = output.blocks.copy()
    blocks[257] = 0
    tensors["output.weight"] = replace(output, blocks=blocks)
    return write_gguf(path, TINY_TEST_CONFIG, tensors, tokenizer(template, eos_id))


@pytest.fixture(scope="package")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write(tmp_path_factory.mktemp("chat") / "chat.gguf"))


@pytest.fixture(scope="package")
def base_gguf(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write(tmp_path_factory.mktemp("chat") / "base.gguf", None))


@pytest.fixture(scope="package")
def model(gguf: str) -> Model:
    return load(gguf)


@pytest.fixture(scope="package")
def base(base_gguf: str) -> Model:
    return load(base_gguf)
