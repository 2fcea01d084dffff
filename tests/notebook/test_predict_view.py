"""The live view of notebook 08: it answers, turns, and says what cannot be."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.model.model import Model
from ktlab.notebook import predict_view
from ktlab.notebook.predict_view import STAGES, PredictView, efficiency_table, with_sockets
from ktlab.placement.machine import get_machine
from ktlab.placement.published import published

MINE = replace(get_machine("1x6454s+4090d"), name="mine", bandwidth=600e9)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(synthesize(TINY_TEST_CONFIG, formats="q8_0"))


@pytest.fixture
def view(model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[PredictView]:
    table = published()
    monkeypatch.setattr(predict_view, "published", lambda: table)
    made = PredictView(model, {"mine": MINE})
    assert made.wait(60).error == ""
    yield made
    made.close()


def test_an_answer_at_once_beside_what_was_published(view: PredictView) -> None:
    found = view.prediction
    assert found is not None and found.top_k == 8 and found.prompt == 500
    assert "nothing here was measured" in view.note
    assert "prefill 82.94 and 74.36" in view.beside.value
    assert f"{found.decode_tokens_per_s:.2g} tokens/s" in view.summary.value
    assert found.generate == 1000 and "1,000 tokens of answer" in view.beside.value
    assert sum(trace.x[1] for trace in view.bars.data) == pytest.approx(1)
    assert {lane for trace in view.line.data for lane in trace.y} == {"CPU", "GPU", "link"}
    assert set(found.times["decode"]) <= set(STAGES)
    shot = view.snapshot()
    assert "experts, compute" in shot.html and len(shot.figures) == 2


def test_every_control_turns_it(view: PredictView) -> None:
    def decode() -> float:
        view.wait(60)
        assert view.error == "" and view.prediction is not None
        return view.prediction.decode_tokens_per_s

    base = decode()
    view.set(experts=6)
    six = decode()
    assert six > base
    view.set(sockets=1)
    assert decode() < six
    assert view.prediction is not None and view.prediction.machine.endswith("1 socket")
    short, one_socket = view.prediction.prefill_tokens_per_s, decode()
    view.set(prompt=1930)
    assert decode() < one_socket, "more is cached"
    assert view.prediction.prompt == 1930 and view.prediction.prefill_tokens_per_s > short
    assert "experts on the GPU" not in view.prediction.times["decode"]
    on_cpu = view.prediction.times["decode"]["experts"]
    view.set(gpu_layers=4)
    decode()
    times = view.prediction.times["decode"]
    assert times["experts on the GPU"] > 0 and times["experts"] < on_cpu
    view.set(machine="mine", model="deepseek-v2-lite")
    assert decode() > six
    assert view.prediction.machine == "mine" and view.experts.value == 6
    assert "no published figure" in view.beside.value and "not fit" not in view.beside.value
    view.set(model="kimi-k2", machine="laptop", engine="llama.cpp")
    view.wait(60)
    assert view.error == "" and "does not fit</span>" in view.beside.value
    view.set(machine="laptop", engine="ktransformers-0.3")
    view.wait(60)
    assert "amx_int8" in view.error


def test_an_error_is_that_of_its_own_engine(view: PredictView) -> None:
    def held_out(engine: str) -> list[float]:
        return [abs(one.error) for one in published().held_out if one.engine == engine]

    for engine in ("ktransformers-0.2", "ktransformers-0.2.1"):
        view.set(engine=engine, machine="2x6454s+4090d")
        view.wait(60)
        errors = held_out(engine)
        assert f"error on {len(errors)} published speeds of this engine" in view.summary.value
        assert f"worst {100 * max(errors):.0f} %" in view.summary.value
        assert "left out" not in view.summary.value
    view.set(engine="ktlab")
    view.wait(60)
    assert "unknown" in view.figures()["error"] and "worst" not in view.summary.value


def test_gpu_layers_are_no_control_where_nothing_runs_on_a_gpu(view: PredictView) -> None:
    assert not view.gpu_layers.disabled
    view.set(gpu_layers=3, engine="ktlab")
    view.wait(60)
    assert view.gpu_layers.disabled and "GPU layers change nothing" in view.note
    view.set(engine="ktransformers-0.2")
    view.wait(60)
    assert not view.gpu_layers.disabled and "change nothing" not in view.note


def test_sockets_bring_their_memory() -> None:
    two = get_machine("2x6454s+4090d")
    one = with_sockets(two, 1)
    assert one.sockets == one.numa_nodes == 1
    assert one["cpu"].capacity == two["cpu"].capacity // 2  # type: ignore[operator]
    assert one["cuda:0"] == two["cuda:0"]
    assert with_sockets(two, 2) is two


def test_the_table_of_efficiencies() -> None:
    html = efficiency_table().html
    assert html.count("fitted</span>") == 5 and "cross_socket" in html
