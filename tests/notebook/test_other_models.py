"""The notebooks' own cells on another model: KTLAB_MODEL names it, and nothing needs to be edited.

Whole notebooks run on the embedded model (tests/test_notebooks.py); here nearly all cells do, in
this process, at the pace of a large model: what is read and timed is as little as there.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest

import ktlab
from ktlab.checkpoint import write_gguf
from ktlab.checkpoint.synthesis import TINY_QWEN3MOE_CONFIG, TINY_V2_CONFIG, synthesize
from ktlab.checkpoint.tokenizer import byte_tokenizer
from ktlab.errors import SettingError
from ktlab.measurement import pace
from ktlab.measurement.pace import Pace
from ktlab.model.load import MODEL_VARIABLE
from ktlab.notebook import (
    ControlRoom,
    control_room_engine,
    mla_view,
    offload_view,
    passages,
    quantization_view,
    rules_view,
)
from ktlab.notebook.instrument import Instrument
from ktlab.notebook.mla_tables import cache_frame
from ktlab.notebook.mla_view import MLAView
from ktlab.notebook.roofline_view import kernel_frame

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
PACED = (control_room_engine, mla_view, offload_view, pace, passages, quantization_view, rules_view)
CLOCK = re.compile(r"\b(roofline|curve)\b|RooflineView\(|doctor\(|\.measure\(")
"""Cells that time the machine, not the model: 45 s in all."""


@pytest.fixture(scope="module", params=[TINY_V2_CONFIG, TINY_QWEN3MOE_CONFIG], ids=lambda c: c.name)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, 16 experts, top 4."""
    config = replace(request.param, hidden_size=256)  # a row of the k formats
    checkpoint = synthesize(config, formats={"*_exps*": "q8_0", "*": "f32"})
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    folder = tmp_path_factory.mktemp("other")
    tokenizer = byte_tokenizer(config.vocab_size)
    return write_gguf(folder / f"{config.name}.gguf", config, tensors, tokenizer)


def code(notebook: Path) -> list[str]:
    cells = nbformat.read(notebook, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_loads_in_one_place_what_the_environment_says(notebook: Path) -> None:
    loading = [line for cell in code(notebook) for line in cell.splitlines() if ".load(" in line]
    assert loading == ["model = ktlab.load()"]
    assert not re.search(r"layers\[\d\d*\]\.(router|experts)|layer=\d", "\n".join(code(notebook)))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_cells_run_on_another_model(
    notebook: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "mla" in notebook.stem and "qwen3" in path.name:
        pytest.skip("grouped queries have one form: refused, see below")
    monkeypatch.setenv(MODEL_VARIABLE, str(path))
    for module in PACED:
        monkeypatch.setattr(module, "pace", lambda _: Pace(token_s=0.4, pass_s=4.0, tokens=64))
    names: dict[str, Any] = {}
    try:
        for cell in code(notebook):
            imports = [line for line in cell.splitlines() if line.startswith(("import", "from"))]
            skipped = CLOCK.search(cell[len("\n".join(imports)) :])
            exec("\n".join(imports) if skipped else cell, names)
        model = names["model"]
        assert isinstance(model, ktlab.Model) and model.name == path.stem
        views = [value for value in names.values() if isinstance(value, Instrument)]
        for view in views:
            assert view.wait(60).error == ""
        if "room" in names:
            assert not names["room"].message
    finally:
        for value in names.values():
            if isinstance(value, Instrument | ControlRoom):
                value.close()


def test_mla_of_a_model_without_it(tmp_path: Path) -> None:
    model = ktlab.Model(synthesize(TINY_QWEN3MOE_CONFIG))
    for show in (lambda: cache_frame(model), lambda: MLAView(model, {"text": "a text"})):
        with pytest.raises(SettingError, match="has grouped-query attention, which has one form"):
            show()


def test_a_setting_that_cannot_compute_this_model_says_why() -> None:
    model = ktlab.Model(synthesize(TINY_V2_CONFIG, formats={"*_exps*": "q8_0", "*": "f32"}))
    settings = {"float32": dict(backend="numpy"), "emulated": dict(isa="amx_bf16_emulated")}
    frame = kernel_frame(model, settings, [1, 2, 3])
    assert "cannot compute" in frame.loc["emulated", "kernel"]
    assert frame.loc["float32", "logits, %"] == "0"
