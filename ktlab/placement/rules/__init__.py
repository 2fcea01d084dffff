"""Injection by rules: KTransformers' YAML files, read and set on a model's live switches."""

from ktlab.placement.rules.preview import Preview, Row
from ktlab.placement.rules.reading import Rule
from ktlab.placement.rules.ruleset import RuleSet

__all__ = ["Preview", "Row", "Rule", "RuleSet"]
