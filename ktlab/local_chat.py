"""KTransformers' `local_chat`, by its names: python -m ktlab.local_chat --gguf_path FILE ...

The meanings are those of kvcache-ai/ktransformers, ktransformers/local_chat.py (0.2 and 0.3). What
it has and this does not is refused by name, never passed over.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ktlab
from ktlab.checkpoint.chat_template import ChatTemplate
from ktlab.checkpoint.safetensors_folder import read_json_object
from ktlab.checkpoint.tokenizer import Tokenizer
from ktlab.errors import KtlabError, RuleError, SettingError, short

QUESTION = "Please write a piece of quicksort code in C++."
"""What KTransformers asks on an empty line without --prompt_file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Chat until the input ends; returns the exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see ktlab.cli
    options = _parser().parse_args(_spelled(sys.argv[1:] if arguments is None else arguments))
    try:
        return _chat(options, _check(options))
    except KeyboardInterrupt:
        print("\nktlab: interrupted", file=sys.stderr)
        return 130
    except (KtlabError, OSError) as error:
        print(f"ktlab: {error}", file=sys.stderr)
        return 2


def _spelled(arguments: Sequence[str]) -> list[str]:
    """--gguf_path for --gguf-path: KTransformers' parser (fire) takes both."""
    spelled = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
        spelled.append(name + equals + value)
    return spelled


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected True or False")
    return text.lower() == "true"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ktlab.local_chat",
        description="Chat with a model, with the options of KTransformers' local_chat.",
        allow_abbrev=False,
    )
    flag: dict[str, Any] = dict(nargs="?", const=True, default=False, type=_flag, metavar="BOOL")
    add = parser.add_argument
    add("--model_path", metavar="DIR", help="Hugging Face folder: tokenizer, chat template, config")
    add("--gguf_path", metavar="DIR_OR_FILE", help="the weights; default: those of --model_path")
    add("--prompt_file", metavar="FILE", help="what an empty line asks")
    add("--cpu_infer", type=int, metavar="N", help="threads; default: one a core")
    add("--cache_lens", type=int, metavar="N", help="tokens of history and answer; default 8192")
    add("--max_new_tokens", type=int, default=300, metavar="N")
    add("--optimize_config_path", metavar="RULES.yaml", help="rules: what is computed how")
    add("--force_think", **flag, help="begin every answer with <think>")
    add("--chunk_prefill_size", type=int, metavar="N", help="prefill goes in pieces of 512 here")
    add("--use_cuda_graph", **flag, help="refused: there is no CUDA part yet")
    add("--mode", default="normal", metavar="NAME", help="only normal")
    return parser


def _check(options: argparse.Namespace) -> "ktlab.RuleSet | None":
    """The rules, if there are any; everything that cannot be done, together."""
    problems, rules = [], None
    if options.optimize_config_path:
        try:
            rules = ktlab.RuleSet.read(options.optimize_config_path)
        except RuleError as error:
            problems.append(f"--optimize_config_path {error}")
    if options.use_cuda_graph:
        problems.append("--use_cuda_graph: nothing runs on CUDA here; leave it out")
    if options.mode != "normal":
        problems.append(f"--mode {options.mode}: expected normal")
    if not options.gguf_path and not options.model_path:
        problems.append("neither --gguf_path nor --model_path: expected the weights of a model")
    for name in ("gguf_path", "model_path", "prompt_file"):
        path = getattr(options, name)
        known = name == "gguf_path" and path == "tiny"
        if path and not known and not Path(path).expanduser().exists():
            problem = f"--{name} {path}: there is no such file or folder"
            if name == "model_path" and re.fullmatch(r"[\w.-]+/[\w.-]+", path):
                problem += "; nothing is downloaded here: name the folder that holds a copy of it"
            problems.append(problem)
    if options.cache_lens is not None and options.cache_lens < 1:
        problems.append(f"--cache_lens {options.cache_lens}: expected 1 token or more")
    if problems:
        raise SettingError("\n  ".join(problems))
    return rules


def _chat(options: argparse.Namespace, rules: "ktlab.RuleSet | None") -> int:
    from ktlab.chat import ChatSession
    from ktlab.chat.session import CHUNK
    from ktlab.chat.terminal import inject, talk

    if options.chunk_prefill_size not in (None, CHUNK):
        asked = f"--chunk_prefill_size {options.chunk_prefill_size} changes nothing"
        print(f"{asked}: prefill goes in pieces of {CHUNK} tokens here", file=sys.stderr)
    model = ktlab.load(options.gguf_path or options.model_path)
    if options.cpu_infer is not None:
        model.set(threads=options.cpu_infer)
    if rules is not None:
        inject(rules, model)
    folder = Path(options.model_path).expanduser() if options.model_path else None
    chat = ChatSession(
        model,
        template=_template(folder, model),
        context=options.cache_lens,
        max_new_tokens=options.max_new_tokens,
        force_think=options.force_think,
        **_sampling(folder),
    )
    fallback = QUESTION
    if options.prompt_file:
        file = Path(options.prompt_file).expanduser()
        fallback = file.read_text(encoding="utf-8", errors="replace")

    def expand(text: str) -> str:
        """As KTransformers: nothing asks the prompt file, the name of a file asks what it says."""
        if not text.strip():
            return fallback
        named = Path(text.strip())
        return named.read_text(encoding="utf-8", errors="replace") if _is_file(named) else text

    talk(chat, prompt="Chat: ", expand=expand, unasked=fallback if options.prompt_file else None)
    return 0


def _is_file(path: Path) -> bool:
    """Whether there is such a file; a question, which may be too long for a name, names none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, a folder that nobody may look into; a zero byte
        return False


def _template(folder: Path | None, model: "ktlab.Model") -> ChatTemplate | None:
    """The template of --model_path, whose tokenizer must be that of the weights."""
    if folder is None or not (folder / "tokenizer.json").exists():
        return None
    beside, own = Tokenizer.from_file(folder), model.tokenizer
    shared = min(beside.vocab_size, own.vocab_size)  # either may be padded to the embedding's rows
    different = [i for i in range(shared) if beside.tokens[i] != own.tokens[i]]
    padding = ("[PAD", "[UNUSED")
    different = [i for i in different if not own.tokens[i].startswith(padding)]
    different = [i for i in different if not beside.tokens[i].startswith(padding)]
    if different:
        i = different[0]
        raise SettingError(
            f"--model_path {folder} is of another model than the weights: of {shared:,} tokens "
            f"{len(different):,} differ, the first is {i}: {beside.tokens[i]!r} there, "
            f"{own.tokens[i]!r} in {model.name}"
        )
    return ChatTemplate.of(beside, str(folder))


def _sampling(folder: Path | None) -> dict[str, Any]:
    """generation_config.json of --model_path, as KTransformers takes it; else temperature 0.6."""
    path = folder / "generation_config.json" if folder else None
    if path is None or not path.exists():
        return {}
    config = read_json_object(path)
    if config.get("do_sample") is False:
        return {"temperature": 0.0}
    found = {}
    for name in ("temperature", "top_p"):
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise SettingError(f"{path}: {name} is {short(value)}, expected a number")
        if value is not None:
            found[name] = float(value)
    return found


if __name__ == "__main__":
    sys.exit(main())
