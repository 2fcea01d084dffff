"""Planning a Hugging Face folder: the same as what is loaded from it."""

import json
from pathlib import Path
from time import process_time

import pytest

import ktlab
from ktlab.checkpoint.hugging_face import SafetensorsCheckpoint
from ktlab.checkpoint.safetensors_file import MappedFile
from ktlab.checkpoint.safetensors_folder import INDEX, read_folder
from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.placement import plan
from ktlab.placement.placed import computed_formats
from tests.model.peer import transformers_model
from tests.placement.big import write_folder


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


@pytest.fixture(scope="module")
def v3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v3")
    write_folder(folder, "deepseek-v3", 163)
    return folder


def test_deepseek_v3_as_published(v3_folder: Path) -> None:
    found = plan(v3_folder, vram="14GB", ram="2TB")
    assert found.parameters == pytest.approx(671e9, rel=1e-3)
    assert found.by_component()["experts"].stored == ("fp8_e4m3",)
    assert any('quantize="int8_channel"' in note for note in found.notes)
    quantized = plan(v3_folder, vram="14GB", ram="2TB", quantize="int8_channel")
    assert quantized.fits and not any("no kernel" in note for note in quantized.notes)
    assert sum(p.stat().st_blocks * 512 for p in v3_folder.iterdir()) < 40 * 10**6


@pytest.mark.alone
def test_headers_of_163_files_are_read_at_once(v3_folder: Path) -> None:
    spent = []
    for _ in range(7):
        start = process_time()
        plan(v3_folder, vram="14GB", ram="2TB")
        spent.append(process_time() - start)
    # Promised: 0.5 s on an idle machine (Zen 4 0.22, a shared Sapphire Rapids host 0.55).
    assert min(spent) < 0.7, spent


def test_an_index_in_any_form_says_the_same(v3_folder: Path, tmp_path: Path) -> None:
    """As it is mostly written, and in forms that take longer to read."""
    for name, path in zip("ab", sorted(v3_folder.glob("*.safetensors")), strict=False):
        (tmp_path / f"{name}.safetensors").symlink_to(path)
    weight_map = {name: entry.path.name for name, entry in read_folder(tmp_path).items()}
    expected = read_folder(tmp_path)
    content = {"metadata": {}, "weight_map": weight_map}
    for text in (
        json.dumps(content, indent=2),
        json.dumps(content),
        json.dumps({"weight_map": weight_map, "metadata": {}}, indent=4),
    ):
        (tmp_path / INDEX).write_text(text, encoding="utf-8")
        assert read_folder(tmp_path) == expected
    some = dict(list(weight_map.items())[: len(weight_map) // 4])
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": some}, indent=2), encoding="utf-8")
    assert read_folder(tmp_path).keys() == some.keys(), "the index decides"
