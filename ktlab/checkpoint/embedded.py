"""Files that come with the kit: the embedded model, texts, tables.

They lie in `data/` of a clone and in `ktlab/data/` of an installed wheel.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from ktlab.errors import CheckpointError

EMBEDDED_MODELS = {"tiny": "tiny.gguf"}
"""Names that `load` takes for files that come with the kit."""

_PACKAGE = Path(__file__).resolve().parents[1]
DATA_FOLDERS = (_PACKAGE / "data", _PACKAGE.parent / "data")


def data_path(*parts: str) -> Path:
    """Path of an embedded file or folder: `data_path("texts", "prose.txt")`."""
    candidates = [folder.joinpath(*parts) for folder in DATA_FOLDERS]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    places = " or ".join(str(candidate) for candidate in candidates)
    raise CheckpointError(
        f"embedded file {'/'.join(parts)} is missing: expected {places}; "
        "install ktlab from its wheel or run it from a complete clone"
    )


class Texts(Mapping[str, str]):
    """Held-out texts by domain, each read when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._paths = {path.stem: path for path in sorted(folder.glob("*.txt"))}
        self._read: dict[str, str] = {}

    def __getitem__(self, domain: str) -> str:
        if domain not in self._read:
            self._read[domain] = self._paths[domain].read_text(encoding="utf-8")
        return self._read[domain]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __repr__(self) -> str:
        return f"Texts({', '.join(self._paths)})"


def domain_texts() -> Texts:
    """{domain: text} of `data/texts/*.txt`: real text that the embedded model never saw."""
    return Texts(data_path("texts"))
