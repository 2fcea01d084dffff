"""The command lines of others: a placement read from llama.cpp's, written for it and for SGLang."""

from ktlab.placement.flags.llama_cpp import LlamaCpp
from ktlab.placement.flags.sglang import SGLang

__all__ = ["LlamaCpp", "SGLang"]
