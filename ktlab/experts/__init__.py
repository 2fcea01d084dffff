"""The experts of a layer: the routed bank, and the shared one."""

from ktlab.experts.bank import ExpertBank
from ktlab.experts.banks import ExpertBanks
from ktlab.experts.mlp import MLP

__all__ = ["MLP", "ExpertBank", "ExpertBanks"]
