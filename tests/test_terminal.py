"""What a terminal of 80 columns shows: nothing that wraps, and no raw dictionary."""

import pytest

import ktlab
from ktlab.placement.machine import get_machine

TEXT = "The router sends each token to eight of sixty-four experts. " * 4


@pytest.fixture(scope="module")
def shown() -> dict[str, object]:
    model = ktlab.load()
    block = model.layers[1]
    with model.override(top_k=6, attention="naive"):
        trace = model.trace(TEXT)
    return {
        "model": model,
        "dense layer": model.layers[0],
        "layer": block,
        **block.stages(),
        "settings": model.settings,
        "cost": model.cost(1),
        "trace": trace,
        "placement": ktlab.Placement.everywhere(model.config, "cpu"),
        "plan": ktlab.plan("deepseek-v3", format="q4_k_m"),
        "plan for a GPU": ktlab.plan("tiny", machine="2x6454s+4090d"),
        "machine": get_machine("2x6454s+4090d"),
        "comparison": ktlab.compare(model, TEXT, a={}, b={"top_k": 6}, max_tokens=32, repeats=1),
    }


def test_fits_80_columns_and_is_in_words(shown: dict[str, object]) -> None:
    for name, thing in shown.items():
        text = repr(thing)
        assert max(map(len, text.splitlines())) <= 80, f"{name} is too wide:\n{text}"
        assert "{" not in text and "Interval(" not in text, f"{name} is raw:\n{text}"


def test_layers_alike_share_a_line_and_nothing_set_says_so(shown: dict[str, object]) -> None:
    text = repr(shown["model"])
    assert "layers[0]: " in text and "layers[1:7]: " in text and text.count("layers[") == 2
    assert "set to: as trained, experts in q8_0" in text
    assert "Cost of 1 token at" in repr(shown["cost"])


def test_a_trace_says_how_the_model_was_set(shown: dict[str, object]) -> None:
    text = " ".join(repr(shown["trace"]).split())
    assert "rules k = 6; attention naive;" in text and "formats q8_0" in text
    assert "auto" not in text and "router.ids (layers 1-6)" in text
