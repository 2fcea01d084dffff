"""Token views: escaped, whole, bounded, and the same numbers as the arrays."""

import re
from html import unescape

import numpy as np
import pytest

from ktlab.errors import SettingError
from ktlab.notebook.expert_choice import (
    common_prefix,
    loss_marks,
    loss_view,
    most_masked,
    pick,
)
from ktlab.notebook.token_view import Mark, expert_details, shares, token_view, tokens_html

PIECES = ["<｜begin▁of▁sentence｜>", "<b>x</b>", "&amp;", '"\n', "\x00\u202e", "", "日本"]


def routing(tokens, layers=(1, 2), k=3, experts=8):
    generator = np.random.default_rng(0)
    ids = {i: np.stack([generator.permutation(experts)[:k] for _ in range(tokens)]) for i in layers}
    return ids, {i: generator.random((tokens, k)) for i in layers}


def shown(html):
    return re.findall(r'<b tabindex="0"[^>]*>(.*?)</b>', html, flags=re.S)


def test_every_token_is_there_and_escaped():
    ids, weights = routing(len(PIECES))
    html = token_view(PIECES, ids, weights, layer=1, num_experts=8, n_group=2)
    tokens = [unescape(token) for token in shown(html)]
    assert len(tokens) == len(PIECES)
    assert "<b>x" not in html and "&lt;b&gt;x&lt;/b&gt;" in html and "&amp;amp;" in html
    assert tokens[0] == "⟨begin of sentence⟩"
    assert tokens[3] == '"⏎\n' and "\x00" not in html
    assert "<script" not in html


def test_the_panel_says_what_the_arrays_say():
    ids = {1: np.array([[5, 2, -1]]), 4: np.array([[7, 0, 3]])}
    weights = {1: np.array([[1.0, 3.0, 0.0]]), 4: np.array([[2.0, 1.0, 1.0]])}
    (detail,) = expert_details(["a\n"], ids, weights, layer=4)
    lines = detail.splitlines()
    assert lines[0] == "token 0  “a⏎”"
    assert lines[2].split() == ["1", "2·75", "5·25"]
    assert lines[3].split() == ["▸", "4", "7·50", "0·25", "3·25"]


def test_shares_of_a_token_without_experts_are_zero():
    assert shares(np.array([[0.0, 0.0], [1.0, 3.0]])).tolist() == [[0, 0], [0.25, 0.75]]


def test_two_thousand_tokens_stay_small_and_more_are_cut():
    ids, weights = routing(2500, layers=range(1, 7), k=8, experts=64)
    pieces = [f" t{i}" for i in range(2500)]
    html = token_view(pieces, ids, weights, layer=3, num_experts=64, n_group=8)
    assert len(shown(html)) == 2000 and "first 2,000 of 2,500" in html
    assert len(html) < 2_000_000


def test_colour_by_one_expert_marks_its_tokens_only():
    ids = {0: np.array([[1, 2], [3, 4]])}
    weights = {0: np.array([[0.5, 0.5], [0.5, 0.5]])}
    html = token_view(["a", "b"], ids, weights, layer=0, num_experts=8, expert=2)
    first, second = re.findall(r"<b [^>]*>", html)
    assert "--a:" in first and "--a:" not in second


def test_lengths_must_agree():
    with pytest.raises(ValueError):
        tokens_html(["a"], [], [Mark()])


def test_loss_view_leaves_the_first_token_unpredicted():
    html = loss_view(["a", "b", "<c>"], np.log([0.5, 0.2]), np.log([0.5, 0.1]), what="a test")
    assert "nothing predicts it" in html and "&lt;c&gt;" in html
    assert unescape(html).count("\nprobability before  ") == 2
    less, same = loss_marks([-2.0, 0.0])
    assert less.opacity > 0.5 and same.opacity == 0


def test_pick_chooses_by_load():
    load_E = [0.1, 0.5, 0.3, 0.1]
    assert pick(load_E, "hottest", 2) == (1, 2)
    assert pick(load_E, "coldest", 1) == (0,)
    assert pick(load_E, "one", 1, first=3) == (3,)
    assert len(set(pick(load_E, "random", 3))) == 3
    assert pick(load_E, "hottest", 0) == ()
    for wrong in (("hottest", 5, 0), ("one", 1, 9), ("best", 1, 0)):
        with pytest.raises(SettingError, match="expected"):
            pick(load_E, wrong[0], wrong[1], first=wrong[2])
    assert most_masked(32, 8) == 24 and most_masked(4, 8) == 0


def test_common_prefix():
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix("ab", "abc") == 2
