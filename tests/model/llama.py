"""llama.cpp, built by somebody else, beside us: what it answers on our files.

xllamacpp is a wheel of llama.cpp's own server code; it runs in a process of its own.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

NEEDS_LLAMA_CPP = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None,
    reason="xllamacpp (llama.cpp as a wheel) is not installed: pip install xllamacpp",
)

RUN = """
import json, sys, xllamacpp
jobs, tokens, probs, exact = json.loads(sys.argv[1])
for path, prompts in jobs.items():
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers = 512, 1, False, 0
    params.cpuparams.n_threads = 2
    if exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    for prompt in prompts:
        request = dict(prompt=prompt, max_tokens=tokens, n_predict=tokens, temperature=0.0,
                       n_probs=probs, logprobs=probs, cache_prompt=False, ignore_eos=True)
        print("ANSWER", json.dumps(server.handle_completions(request)))
"""


def answers(
    jobs: Mapping[Path, Sequence[str | list[int]]],
    *,
    tokens: int = 12,
    probs: int = 8,
    exact: bool = False,
) -> list[dict[str, Any]]:
    """The greedy completion of each prompt (text or ids) by each file, one after another.

    Each token comes with the log-probabilities of the `probs` likeliest; `exact`: cache in float32.
    """
    prompts = {str(path): list(texts) for path, texts in jobs.items()}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([prompts, tokens, probs, exact])],
        capture_output=True,
        text=True,
        timeout=240,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert len(lines) == sum(map(len, prompts.values())), done.stderr[-2000:]
    return [json.loads(line.removeprefix("ANSWER")) for line in lines]
