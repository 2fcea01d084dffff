"""What deferral gains, by hand and for a model."""

from dataclasses import replace

import pytest

from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.errors import SettingError
from ktlab.model.model import Model
from ktlab.placement.overlap import (
    DeferralGain,
    Lanes,
    LayerTimes,
    PassTimes,
    deferral_gain,
    measured_times,
    predicted_times,
    timeline,
)
from ktlab.placement.predict import predict

DENSE = LayerTimes(layer=0, attention_s=2, beside_s=1)
EQUAL = tuple(LayerTimes(layer=i, attention_s=4, experts_s=8, experts=4) for i in (1, 2, 3))
PASS = PassTimes(layers=EQUAL)


def test_without_it_each_waits_for_the_other() -> None:
    line = timeline([DENSE, *EQUAL], after_s=1)
    assert line.seconds == 2 + 1 + 3 * (4 + 8) + 1
    assert line.overlap("GPU", "CPU") == 0


def test_with_it_the_deferred_run_beside_the_next_attention() -> None:
    """4 experts of 2 s: 2 deferred take the 4 s of the next attention. The last defers none."""
    line = timeline(EQUAL, 2)
    found = {span.label: (span.start_s, span.end_s) for span in line.spans}
    assert found["layer 1: 2 experts"] == (4, 8)
    assert found["layer 1: 2 deferred experts"] == (8, 12)
    assert found["layer 2: attention and router"] == (8, 12)
    assert found["layer 2: 2 experts"] == (12, 16)
    assert found["layer 3: 4 experts"] == (20, 28) and line.seconds == 28
    assert "layer 3: 2 deferred experts" not in found


def test_what_is_put_off_must_be_back_with_the_next_layers_own() -> None:
    """Deferring more than the attention hides delays the next layer, and gains nothing more."""
    gain = deferral_gain(PASS)
    assert [line.seconds for line in gain.timelines] == [36, 32, 28, 28, 28]
    assert [g.value for g in gain.gains] == [1.0, 36 / 32, 36 / 28, 36 / 28, 36 / 28]
    assert gain.best == 2


def test_shared_experts_and_copies_take_part() -> None:
    times = [
        LayerTimes(layer=i, attention_s=2, beside_s=3, experts_s=4, experts=2, there_s=1, back_s=1)
        for i in (0, 1)
    ]
    line = timeline(times, 0, lanes=Lanes(attention="A", link="PCIe", experts="B"))
    assert line.lanes == ("A", "PCIe", "B") and line.seconds == 2 * (2 + 1 + 4 + 1)
    assert line.overlap("A", "B") == 4, "shared experts run while the routed ones do"


def test_a_call_costs_something_however_few_experts_it_has() -> None:
    times = LayerTimes(layer=0, attention_s=1, experts_s=10, experts=4, call_s=2)
    assert [times.some(n) for n in (0, 1, 4)] == [0, 4, 10]


def test_the_gain_is_data_and_shows_itself() -> None:
    gain = deferral_gain(PASS, method="made up")
    assert DeferralGain.from_json(gain.to_json()) == gain
    frame = gain.to_frame()
    assert frame.loc[2, "gain"] == pytest.approx(36 / 28)
    assert frame.loc[2, "CPU busy"] == pytest.approx(24 / 28)
    assert "2  28 s  ×1.29" in repr(gain) and "made up" in repr(gain)
    assert "<table>" in gain._repr_mimebundle_()["text/html"]
    names = {trace.name for trace in gain.plot().data}
    assert names == {"attention", "experts", "deferred experts"}
    assert len(set(gain.plot(0).data[0].y)) == 1, "one timeline where none is deferred"


def test_measured_on_a_model() -> None:
    model = Model(synthesize(TINY_TEST_CONFIG))
    with model.override(deferred=1):
        times = measured_times(model, tokens=3, context=4)
        assert model.settings.deferred, "the model itself is not touched"
    layers = times.layers
    assert [layer.layer for layer in layers] == [0, 1, 2] and times.output_s > 0
    assert layers[0].experts == 0 and layers[1].experts == 4 and layers[1].experts_s > 0
    assert len(times.tokens) == 3 and all(len(token.layers) == 3 for token in times.tokens)
    gain = deferral_gain(times)
    assert gain.gains[0].value == 1.0 and gain.seconds[0].half_width > 0
    assert len(gain.seconds_by_token) == 3


def test_a_measured_gain_has_its_interval() -> None:
    """Of tokens whose attention hides more or less; a prediction's numbers stand alone."""
    tokens = tuple(
        PassTimes(layers=tuple(replace(layer, attention_s=float(s)) for layer in EQUAL))
        for s in range(1, 8)
    )
    gain = deferral_gain(replace(PASS, tokens=tokens))
    two = gain.gains[2]
    each = [line[0] / line[2] for line in gain.seconds_by_token]
    assert (two.value, two.low, two.high) == (sorted(each)[3], min(each), max(each))
    assert two.low < two.value < two.high and 0.95 <= two.level < 1
    assert gain.timelines[0].seconds == gain.seconds[0].value, "drawn is a token, not its stages"
    frame = gain.to_frame()
    assert frame.loc[2, "gain_low"] == two.low and frame.loc[2, "seconds_high"] == 37
    drawn = {name for trace in gain.plot(2).data for name in trace.y[0]}
    assert f"×{two}" in repr(gain) and any(f"×{two}" in name for name in drawn)
    assert max(map(len, repr(gain).splitlines())) <= 80
    assert "±" not in repr(deferral_gain(PASS)) and "[" not in repr(deferral_gain(PASS))


def test_predicted_for_a_published_machine() -> None:
    """The timeline without deferral is `ktlab.predict`'s."""
    told = predict("deepseek-v3", machine="2x6454s+4090d", engine="ktransformers-0.2.1", generate=1)
    times = predicted_times("deepseek-v3", context=512)
    layers = times.layers
    assert len(layers) == 61 and layers[0].experts == 0 and layers[3].experts == 8
    plain = timeline(layers, after_s=times.output_s)
    assert plain.seconds == pytest.approx(1 / told.decode_tokens_per_s, rel=0.01)
    gain = deferral_gain(times)
    assert 1.1 < max(g.value for g in gain.gains) < 2 and 0 < gain.best < 8
    with pytest.raises(SettingError, match="nothing to overlap"):
        predicted_times("deepseek-v3", engine="llama.cpp")


def test_errors() -> None:
    with pytest.raises(SettingError, match="expected 0 to 4"):
        timeline(EQUAL, 5)
    with pytest.raises(SettingError, match="takes -1"):
        timeline([LayerTimes(layer=0, attention_s=-1)])
    with pytest.raises(SettingError, match="expected 0 to 4"):
        deferral_gain(PASS).plot(9)
    with pytest.raises(SettingError, match="tokens = 0"):
        measured_times(Model(synthesize(TINY_TEST_CONFIG)), tokens=0)
