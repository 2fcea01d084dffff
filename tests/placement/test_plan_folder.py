"""Planning a Hugging Face folder: the same as what is loaded from it."""

from pathlib import Path

import pytest

import ktlab
from ktlab.checkpoint.hugging_face import SafetensorsCheckpoint
from ktlab.checkpoint.safetensors_file import MappedFile
from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.placement import plan
from ktlab.placement.placed import computed_formats
from tests.model.peer import transformers_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder") / "model"
    transformers_model(synthesize(TINY_TEST_CONFIG)).bfloat16().save_pretrained(path)
    return path


def test_bf16_and_quantized_while_loading(folder: Path) -> None:
    stored, quantized = plan(folder), plan(folder, quantize="int8_channel")
    assert stored.by_component()["experts"].formats == ("bf16",)
    assert quantized.by_component()["experts"].formats == ("int8_channel",)
    assert quantized.stored_bytes == stored.stored_bytes
    model = ktlab.load(folder, quantize="int8_channel")
    experts = sum(block.experts.nbytes for block in model.moe_blocks)
    assert quantized.by_component()["experts"].bytes == experts
    assert model.residency().converted >= experts


def test_a_folder_as_a_gguf_of_it_would_be(folder: Path) -> None:
    made = plan(folder, format="q8_0")
    assert made.by_component()["experts"].stored == ("q8_0",)
    assert "q8_0" in computed_formats() and "made anew as q8_0" in made.source


def test_headers_say_what_the_tensors_are(folder: Path) -> None:
    checkpoint = SafetensorsCheckpoint(folder)
    tensors = (checkpoint.tensor(name) for name in checkpoint.names())
    expected = [(t.name, t.format.name, t.shape, t.nbytes) for t in tensors]
    assert SafetensorsCheckpoint(folder).described() == expected


def test_planning_reads_no_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: MappedFile, entry: object) -> None:
        raise AssertionError(f"{entry} was read")

    monkeypatch.setattr(MappedFile, "bytes_of", read)
    assert plan(folder).stored_bytes > 0
