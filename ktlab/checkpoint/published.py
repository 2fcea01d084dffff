"""Models that everybody knows, by their published configurations; no weights of them are here."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ktlab.checkpoint.config import ModelConfig
from ktlab.checkpoint.embedded import data_path
from ktlab.checkpoint.hugging_face_config import config_from_json
from ktlab.errors import CheckpointError, nearest


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A configuration and what its authors say of it."""

    name: str
    config: ModelConfig
    source: str
    total_parameters: float
    """As published, rounded; so is `active_parameters`, those that one token uses."""
    active_parameters: float
    parameters_source: str


@lru_cache(maxsize=1)
def published_models() -> Mapping[str, PublishedModel]:
    """{name: model} of data/models/*.json; "deepseek-r1" is another name of "deepseek-v3"."""
    models: dict[str, PublishedModel] = {}
    for path in sorted(data_path("models").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for name in (path.stem, *content.get("aliases", ())):
            models[name] = _model(name, path.name, content)
    return models


def published_model(name: str) -> PublishedModel:
    """The model of that name; CheckpointError with the nearest."""
    models = published_models()
    if name.lower() not in models:
        raise CheckpointError(
            f'no published model "{name}"{nearest(name, models)}; there are {", ".join(models)}'
        )
    return models[name.lower()]


def _model(name: str, where: str, content: Mapping[str, Any]) -> PublishedModel:
    said = content["published"]
    return PublishedModel(
        name=name,
        config=config_from_json(where, name, content["config"]),
        source=content["source"],
        total_parameters=said["total_parameters"],
        active_parameters=said["active_parameters"],
        parameters_source=said["source"],
    )
