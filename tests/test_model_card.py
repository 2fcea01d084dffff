"""The model card is of the file beside it, and says what the embedded model promises."""

import json

import pytest

import ktlab
from ktlab.checkpoint.embedded import data_path
from ktlab.measurement.quality import measure_quality

CARD = json.loads(data_path("model_card.json").read_text(encoding="utf-8"))


def test_the_card_is_of_this_file() -> None:
    assert CARD["model"]["fingerprint"] == ktlab.load("tiny").identity.fingerprint
    assert set(CARD["bits_per_byte"]["domains"]) == set(ktlab.domain_texts())


def test_quality_is_what_the_lab_needs() -> None:
    bits = CARD["bits_per_byte"]
    assert bits["macro"] <= 1.6 and len(bits["domains"]) >= 6
    change = [CARD["quality_by_k"]["rows"][str(k)]["bits_per_byte_change"] for k in range(1, 9)]
    pairs = zip(change, change[1:], strict=False)
    assert all(worse["low"] > better["high"] for worse, better in pairs)
    divergence = [row["domain_divergence_bits"] for row in CARD["routing"]["layers"].values()]
    by_chance = [row["divergence_by_chance_bits"] for row in CARD["routing"]["layers"].values()]
    assert all(d["low"] > c for d, c in zip(divergence, by_chance, strict=True))


def test_a_figure_of_the_card_measured_again() -> None:
    rows = CARD["quality_by_k"]
    texts = dict(ktlab.domain_texts())
    found = measure_quality(
        ktlab.load("tiny"), texts, a={}, b={"top_k": 4}, window=rows["window"],
        max_tokens=512 * len(texts),
    )  # fmt: skip
    assert found is not None
    assert float(found[0].kl_mean) == pytest.approx(rows["rows"]["4"]["kl_mean"]["value"], rel=0.3)
