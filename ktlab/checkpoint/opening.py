"""From a name or a path to a checkpoint."""

from pathlib import Path

from ktlab.checkpoint.checkpoint import Checkpoint
from ktlab.checkpoint.embedded import EMBEDDED_MODELS, data_path
from ktlab.checkpoint.gguf_file import GGUFCheckpoint
from ktlab.checkpoint.hugging_face import SafetensorsCheckpoint
from ktlab.checkpoint.safetensors_folder import safetensors_folder
from ktlab.checkpoint.shards import no_file, siblings_of
from ktlab.errors import CheckpointError


def open_checkpoint(path_or_name: str | Path) -> Checkpoint:
    """Open "tiny" (the embedded model), a .gguf file or shard, or a folder: of shards, of one .gguf
    file, or of safetensors with config.json. Nothing is decoded yet."""
    if str(path_or_name) in EMBEDDED_MODELS:
        name = str(path_or_name)
        return GGUFCheckpoint(data_path(EMBEDDED_MODELS[name]), name=name)
    path = Path(path_or_name).expanduser()
    known = ", ".join(EMBEDDED_MODELS)
    folder = safetensors_folder(path)
    if folder is not None:
        return SafetensorsCheckpoint(folder)
    if path.is_dir() and not any(path.glob("*.gguf")):
        raise CheckpointError(
            f"{path} is a folder without *.safetensors and config.json, and without *.gguf; "
            f"expected one with either, a .gguf file or one of: {known}"
        )
    if not path.exists() and not siblings_of(path):
        said = no_file(path, EMBEDDED_MODELS)
        raise CheckpointError(f"{said}; expected a .gguf file or one of: {known}")
    try:
        return GGUFCheckpoint(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
