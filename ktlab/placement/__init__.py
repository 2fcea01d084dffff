"""Where a model goes: what it needs, device by device, before anything is loaded."""

from ktlab.placement.flags import LlamaCpp, SGLang
from ktlab.placement.machine import Device, Machine
from ktlab.placement.placement import Placement
from ktlab.placement.plan import Plan, plan
from ktlab.placement.presets import Preset

__all__ = ["Device", "LlamaCpp", "Machine", "Placement", "Plan", "Preset", "SGLang", "plan"]
