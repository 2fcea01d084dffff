"""A model's chat template: Jinja source from its file, rendered where it can do no harm.

A template that loops, doubles a text or reaches for Python's insides is stopped with an error:
it runs in a process of its own with limits (`chat_template_child.py`).
"""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktlab.checkpoint.tokenizer import Tokenizer, valid_text
from ktlab.errors import KtlabError

CPU_S = 4
"""Processor time for one rendering; a long history takes a tenth of a second."""
WALL_S = 60
"""The same by the clock, for a machine that is busy with other things."""
MEMORY_BYTES = 768 << 20
CHARACTERS = 16_000_000
"""Most that a rendering may write: several times what fits any model's context."""
_CHILD = Path(__file__).with_name("chat_template_child.py")

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text, ...}"""


class TemplateError(KtlabError):
    """A chat template that is broken, does not take these messages, or had to be stopped."""


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """How messages become the text that a chat model was trained on."""

    source: str
    """Jinja, as transformers' apply_chat_template takes it."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """bos_token, eos_token: what templates call the tokens by."""
    where: str = "chat template"
    """The file, for messages."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, where: str = "chat template") -> "ChatTemplate | None":
        """The template that came with `tokenizer`; None for a base model, which has none."""
        if not tokenizer.chat_template:
            return None
        named = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        variables = {name: tokenizer.tokens[i] for name, i in named.items() if i is not None}
        return cls(source=tokenizer.chat_template, variables=variables, where=where)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of `messages`, by default with the beginning of the answer to come.

        `variables` are handed to the template (tools=[...], enable_thinking=False). The text
        begins with the BOS token where the template writes one: encode it with
        `tokenizer.encode(text, bos=False, special=True)`. Raises `TemplateError`.
        """
        context = {
            **self.variables,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            **{"tools": None, "documents": None, **variables},
        }
        limits = {"cpu_s": CPU_S, "memory_bytes": MEMORY_BYTES, "characters": CHARACTERS}
        request = json.dumps({"source": self.source, "context": context, "limits": limits})
        try:
            # -I: neither PYTHONPATH nor the current folder can put another jinja2 there.
            done = subprocess.run(
                [sys.executable, "-I", str(_CHILD)],
                input=request.encode(),
                capture_output=True,
                timeout=WALL_S,
            )
        except subprocess.TimeoutExpired:
            raise self._error(f"stopped after {WALL_S} s: it does not end") from None
        if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            raise self._error(
                f"stopped after {CPU_S} s of processor time: it does not come to an end"
            )
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise self._error(f"stopped: {' '.join(said) or f'exit code {done.returncode}'}")
        answer = json.loads(done.stdout)
        if "error" in answer:
            raise self._error(_REASONS[answer["error"]].format(answer["message"]))
        return valid_text(answer["text"])

    def _error(self, what: str) -> TemplateError:
        return TemplateError(f"{self.where}: the chat template was {what}")


_REASONS = {
    "raised": "not willing to take these messages: {}",
    "sandbox": "refused, it reaches out of its sandbox: {}",
    "syntax": "refused, it is not valid Jinja: {}",
    "limit": "stopped: {}",
    "failed": "left with an error: {}",
}
