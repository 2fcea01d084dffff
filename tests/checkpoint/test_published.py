"""Published configurations: their shapes must give the published parameters and file sizes."""

import json

import pytest

from ktlab.checkpoint.embedded import data_path
from ktlab.checkpoint.facts import read_facts
from ktlab.checkpoint.published import published_model, published_models
from ktlab.errors import CheckpointError

TABLE = json.loads(data_path("published_memory.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", published_models())
def test_parameters(name: str) -> None:
    model, facts = published_model(name), read_facts(name)
    k, experts = model.config.top_k, model.config.num_experts
    used = sum(t.size * (k / experts if "_exps." in t.name else 1) for t in facts.tensors)
    # Kimi-K2's "1T" is 1.03, Moonlight's "3B" 2.9; the others are published to two digits or more.
    loose = name.startswith(("kimi", "moonlight"))
    assert facts.size == pytest.approx(model.total_parameters, rel=0.03 if loose else 0.005)
    embedding = model.config.vocab_size * model.config.hidden_size
    published = model.active_parameters
    assert used - embedding < 1.025 * published and used > 0.96 * published


@pytest.mark.parametrize(
    "entry", TABLE["file_sizes"], ids=lambda entry: f"{entry['model']}-{entry['format']}"
)
def test_file_sizes(entry: dict) -> None:
    """Every mixture to 0.05 %: a tensor in the wrong format would show."""
    found = read_facts(entry["model"], format=entry["format"])
    assert found.nbytes == pytest.approx(entry["bytes"], rel=5e-4)


def test_unknown_model() -> None:
    with pytest.raises(CheckpointError, match='did you mean "kimi-k2"'):
        published_model("kimi-k3")
