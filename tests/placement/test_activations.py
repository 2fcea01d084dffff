"""What a plan counts for activations, beside what a process took of memory for them."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ktlab.checkpoint.config import MLASizes
from ktlab.checkpoint.published import published_model
from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.placement import plan
from ktlab.placement.ledger import activation_bytes
from tests.checkpoint.conftest import save

MANY_HEADS = MLASizes(
    num_heads=64, q_lora_rank=0, kv_lora_rank=128, qk_nope_dim=64, qk_rope_dim=32, v_dim=64
)
TOKENS = 1536 + 100
"""Three calls of 512, then one so short that its scores lie in memory."""

CHILD = """
import sys, threading, time
import numpy as np
import ktlab

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))

model = ktlab.load(sys.argv[1])
ids = np.arange(int(sys.argv[2])) % model.config.vocab_size
model.next_logits(ids[None, :8], model.new_cache(1, 8))  # made once: threads, packed weights
cache = model.new_cache(1, len(ids))
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
model.next_logits(ids[None], cache)
done = True
thread.join()
print(peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_activations_of_a_prompt_as_measured(tmp_path: Path) -> None:
    config = replace(
        TINY_TEST_CONFIG, name="many heads", attention=MANY_HEADS, context_length=4096, num_layers=2
    )
    path = save(synthesize(config), tmp_path / "heads.gguf")
    found = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(TOKENS)], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    one = plan(path, context=TOKENS)["cpu"]
    measured = int(found.stdout) - one.cache - one.converted
    # The plan's last call is as long as it can be and still have scores (128 tokens, here 100).
    assert 0.7 * measured < one.activations < 1.5 * measured, (measured, one.activations)


def test_a_long_prompt_over_the_latent_has_no_scores() -> None:
    config = published_model("deepseek-v3").config
    sizes = config.mla
    most = sizes.most_absorbed
    assert most is not None and 0 < most < 512
    naive = activation_bytes(config, "naive", 512, 8192, "cpu")
    absorbed = activation_bytes(config, "absorbed", 512, 8192, "cpu")
    scores = 2 * 4 * sizes.num_heads * 8192
    assert naive > 512 * scores and most * scores < absorbed < 512 * scores
    # Tokens that are too few for it have scores, each.
    assert activation_bytes(config, "absorbed", most, 8192, "cpu") > most * scores
