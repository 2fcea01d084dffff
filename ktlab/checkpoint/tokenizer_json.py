"""A tokenizer.json and what lies beside it, as the arguments of a `Tokenizer`.

The `tokenizers` library reads the file itself, so ids are those of Hugging Face also where the
pre-tokenizer has no name in GGUF.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from ktlab.checkpoint.pretokenizers import byte_level, pre_tokenizer_name
from ktlab.checkpoint.tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED
from ktlab.errors import CheckpointError, nearest

UNNAMED = "tokenizer.json"
"""`Tokenizer.pre` where a GGUF has no name for it."""
_BOS = r"bos|begin.of.sentence|begin.of.text|^<s>$"
_EOS = r"eos|end.of.sentence|end.of.text|endoftext|^</s>$"


def read_tokenizer_json(path: Path, *, bos: str | None, eos: str | None) -> dict[str, Any]:
    """Arguments for `Tokenizer(...)`; CheckpointError on what is no byte-level BPE."""
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; expected a tokenizer.json")
    content = _read(path)
    try:
        kind = content["model"].get("type", "BPE")
        added = content.get("added_tokens") or []
        vocabulary = dict(content["model"]["vocab"]) | {t["content"]: t["id"] for t in added}
        kinds = {t["id"]: CONTROL if t["special"] else USER_DEFINED for t in added}
        merges = content["model"].get("merges", [])
        cut, normalizer = content.get("pre_tokenizer"), content.get("normalizer")
        to_bytes, pre = byte_level(cut), pre_tokenizer_name(cut, normalizer)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path.name}: not a tokenizer.json: {error!r}") from error
    if kind != "BPE" or not to_bytes:
        raise CheckpointError(
            f"{path.name}: tokenizer model {kind}"
            f"{' without a ByteLevel step' if kind == 'BPE' else ''}, expected byte-level BPE"
        )
    try:
        bpe = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path.name}: unusable tokenizer: {error}") from error
    bpe.encode_special_tokens = True  # control tokens come only where they are asked for
    bpe.no_truncation()
    bpe.no_padding()

    config = _read(path.with_name("tokenizer_config.json"), missing_ok=True)
    named = {key: bos_or_eos for key in ("bos", "eos") if (bos_or_eos := _named(config, key))}
    by_id = {i: token for token, i in vocabulary.items()}
    size = max(by_id, default=-1) + 1
    if size > 4 * len(by_id) + 1024:
        raise CheckpointError(
            f"{path.name}: the largest token id is {size - 1} and there are {len(by_id)} tokens; "
            "the file is damaged"
        )

    def special(given: str | None, key: str, pattern: str) -> int | None:
        given = given or named.get(key)
        if given is not None:
            if given not in vocabulary:
                raise CheckpointError(
                    f'{path.name}: no token "{given}"{nearest(given, vocabulary)}'
                )
            return int(vocabulary[given])
        if config:
            return None  # it had the chance to name one
        names = [t["content"] for t in added if re.search(pattern, t["content"], re.I)]
        return int(vocabulary[names[0]]) if names else None

    bos_id = special(bos, "bos", _BOS)
    return dict(
        tokens=[by_id.get(i, f"[UNUSED{i}]") for i in range(size)],
        merges=[tuple(m) if isinstance(m, list) else m for m in merges],
        pre=pre or UNNAMED,
        types=[kinds.get(i, NORMAL if i in by_id else UNUSED) for i in range(size)],
        bos_id=bos_id,
        eos_id=special(eos, "eos", _EOS),
        add_bos=_adds_bos(config, content.get("post_processor"), by_id.get(bos_id or 0, "")),
        stop_ids=_stop_ids(path),
        chat_template=_template(path, config),
        source=path.name,
        bpe=bpe,
    )


def _read(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    if missing_ok and not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name}: a JSON {type(content).__name__}, expected an object")
    return content


def _named(config: Mapping[str, Any], key: str) -> str | None:
    """bos_token or eos_token, which is text or an object with its text."""
    token = config.get(f"{key}_token")
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) and token else None


def _adds_bos(config: Mapping[str, Any], post: Mapping[str, Any] | None, bos: str) -> bool:
    """tokenizer_config.json decides, then the post-processor; a lone tokenizer.json adds one."""
    if isinstance(config.get("add_bos_token"), bool):
        return bool(config["add_bos_token"])
    if "LlamaTokenizer" in str(config.get("tokenizer_class")):
        return True
    return not config or (bool(bos) and bos in json.dumps(post, ensure_ascii=False))


def _stop_ids(path: Path) -> list[int]:
    ids = _read(path.with_name("generation_config.json"), missing_ok=True).get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    return [i for i in ids if isinstance(i, int)]


def _template(path: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else the one in tokenizer_config.json; of several the "default"."""
    beside = path.with_name("chat_template.jinja")
    if beside.exists():
        try:
            return beside.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{beside}: {error}; expected text in UTF-8") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        several = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
        template = several.get("default") or next(iter(several.values()), None)
    return template if isinstance(template, str) else None
