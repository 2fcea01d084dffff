"""Embedded files are found in a clone and in an installed package, or named when missing."""

from pathlib import Path

import pytest

from ktlab.checkpoint import data_path, domain_texts, embedded, open_checkpoint
from ktlab.errors import CheckpointError


@pytest.mark.parametrize("folder", [0, 1], ids=["package", "clone"])
def test_found_in_either_place(
    folder: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = (tmp_path / "package", tmp_path / "clone")
    monkeypatch.setattr(embedded, "DATA_FOLDERS", folders)
    texts = folders[folder] / "texts"
    texts.mkdir(parents=True)
    (texts / "prose.txt").write_text("Ein Text", encoding="utf-8")
    (texts / "README.md").touch()
    assert data_path("texts", "prose.txt") == texts / "prose.txt"
    found = domain_texts()
    assert list(found) == ["prose"] and found["prose"] == "Ein Text"
    (texts / "prose.txt").unlink()
    assert found["prose"] == "Ein Text", "read once"
    assert repr(found) == "Texts(prose)"
    with pytest.raises(KeyError):
        found["poetry"]


def test_missing_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "DATA_FOLDERS", (tmp_path / "a", tmp_path / "b"))
    with pytest.raises(CheckpointError, match="tiny.gguf is missing: expected .*/a/.* or .*/b/"):
        open_checkpoint("tiny")
    with pytest.raises(CheckpointError, match="texts is missing"):
        domain_texts()
