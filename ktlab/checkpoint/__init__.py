"""Where weights come from: GGUF files, memory, synthesis; names, configuration, tokenizer."""

from ktlab.checkpoint.checkpoint import Checkpoint, MemoryCheckpoint
from ktlab.checkpoint.config import ModelConfig, YarnScaling
from ktlab.checkpoint.embedded import data_path, domain_texts
from ktlab.checkpoint.gguf_file import GGUFCheckpoint
from ktlab.checkpoint.names import expected_tensors
from ktlab.checkpoint.opening import open_checkpoint
from ktlab.checkpoint.synthesis import synthesize
from ktlab.checkpoint.tokenizer import Tokenizer
from ktlab.checkpoint.writer import write_gguf

__all__ = [
    "Checkpoint",
    "GGUFCheckpoint",
    "MemoryCheckpoint",
    "ModelConfig",
    "Tokenizer",
    "YarnScaling",
    "data_path",
    "domain_texts",
    "expected_tensors",
    "open_checkpoint",
    "synthesize",
    "write_gguf",
]
