"""Which tokens of the two continuations are marked as changed."""

import torch

from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.measurement.tokens import Prediction
from ktlab.model.model import Model
from ktlab.notebook.control_room_phases import marked

PROMPT, TOKENS = [5, 60, 70, 80], 16


def greedy(model: Model) -> list[int]:
    return [t.id for t in model.stream(PROMPT, max_new_tokens=TOKENS, stop_at_eos=False)]


def predicted(model: Model, ids: list[int]) -> Prediction:
    logits = model.forward([*PROMPT, *ids[:-1]])[len(PROMPT) - 1 :]
    return Prediction.of(logits, torch.tensor(ids))


def test_a_token_is_marked_where_the_change_would_write_another() -> None:
    model = Model(synthesize(TINY_TEST_CONFIG, seed=3))
    before = greedy(model)
    first = predicted(model, before)
    with model.override(top_k=1):
        after, second = greedy(model), predicted(model, before)
        logits = model.forward([*PROMPT, *before[:-1]])[len(PROMPT) - 1 :]
    found = marked(model, PROMPT, before, (first, second), after, done=True)
    expected = (logits.argmax(-1) != torch.tensor(before)).tolist()
    assert [token.changed for token in found.before] == expected
    assert any(expected) and any(token.changed for token in found.after)


def test_nothing_is_marked_where_nothing_changed() -> None:
    model = Model(synthesize(TINY_TEST_CONFIG, seed=3))
    before = greedy(model)
    same = predicted(model, before)
    found = marked(model, PROMPT, before, (same, same), before, done=True)
    assert not any(token.changed for token in (*found.before, *found.after))
