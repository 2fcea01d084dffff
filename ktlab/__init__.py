"""ktlab: look inside hybrid mixture-of-experts inference, change a stage, measure what it costs.

>>> import ktlab
>>> model = ktlab.load("tiny")
>>> with model.override(top_k=6):
...     trace = model.trace("def quicksort(items):")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ktlab.checkpoint.embedded import domain_texts
    from ktlab.measurement.compare import compare, sweep
    from ktlab.measurement.doctor import doctor
    from ktlab.model.load import load
    from ktlab.model.model import Model
    from ktlab.model.trace import Trace
    from ktlab.placement.machine import Machine
    from ktlab.placement.placement import Placement
    from ktlab.placement.plan import Plan, plan
    from ktlab.placement.predict import Prediction, predict
    from ktlab.placement.rules import RuleSet
    from ktlab.routing.rules import CumulativeProbability, FixedK, RelativeThreshold

# Imported on first use, so that `import ktlab` costs nothing.
_HOMES = {
    "load": "ktlab.model.load",
    "Model": "ktlab.model.model",
    "Trace": "ktlab.model.trace",
    "plan": "ktlab.placement.plan",
    "Plan": "ktlab.placement.plan",
    "predict": "ktlab.placement.predict",
    "Prediction": "ktlab.placement.predict",
    "Placement": "ktlab.placement.placement",
    "Machine": "ktlab.placement.machine",
    "RuleSet": "ktlab.placement.rules",
    "domain_texts": "ktlab.checkpoint.embedded",
    "compare": "ktlab.measurement.compare",
    "sweep": "ktlab.measurement.compare",
    "doctor": "ktlab.measurement.doctor",
    "FixedK": "ktlab.routing.rules",
    "RelativeThreshold": "ktlab.routing.rules",
    "CumulativeProbability": "ktlab.routing.rules",
}

__all__ = [
    "CumulativeProbability",
    "FixedK",
    "Machine",
    "Model",
    "Placement",
    "Plan",
    "Prediction",
    "RelativeThreshold",
    "RuleSet",
    "Trace",
    "__version__",
    "compare",
    "doctor",
    "domain_texts",
    "load",
    "plan",
    "predict",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ktlab' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
