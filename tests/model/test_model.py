"""Switches, caches, generation, cost and errors of a model with random weights."""

import threading

import pytest
import torch

from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, TINY_V2_CONFIG, synthesize
from ktlab.errors import CheckpointError, ContextError, SettingError, StageError, TraceError
from ktlab.model import model as model_module
from ktlab.model.model import Model
from ktlab.probe import Probe, Recorder
from ktlab.routing import CumulativeProbability, FixedK, RelativeThreshold

IDS = torch.randint(0, 256, (60,), generator=torch.manual_seed(3))

OVERRIDES = [
    {"top_k": 2},
    {"top_k": {1: 3, 2: 6}},
    {"rule": RelativeThreshold(0.5, k_max=4)},
    {"rule": {2: CumulativeProbability(0.6, k_max=8)}},
    {"attention": "naive"},
    {"attention": {0: "naive"}},
    {"backend": "numpy"},
    {"backend": "torch"},
    {"backend": {1: "numpy", "attention": "torch"}},
    {"layout": "packed"},
    {"layout": {"experts": "packed"}, "threads": 1},
    {"few": 1},
    {"quantize": "q4_0"},
    {"format": "int8_channel"},
    {"format": {"experts": "q5_0", 2: "int8_channel"}},
    {"format": {"experts": "int4_group32", "attention": "int8_channel"}, "layout": "packed"},
    {"quantize": {"attention": "q4_0", "shared": "q5_0", "dense": "q4_0", "output": "q8_0"}},
    {"mask": {1: [0, 3]}},
    {"force": {2: [7]}},
    {"top_k": 3, "attention": "naive", "quantize": "q5_0", "backend": "torch"},
]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(synthesize(TINY_TEST_CONFIG, seed=1, formats="q8_0"))


@pytest.mark.parametrize("changes", OVERRIDES, ids=lambda c: ",".join(c))
def test_override_changes_and_restores_bit_for_bit(model: Model, changes: dict) -> None:
    before, settings = model.forward(IDS), model.settings
    with model.override(**changes):
        assert model.settings != settings
        inside = model.forward(IDS)
        assert inside.isfinite().all()
        if not set(changes) <= {"attention", "backend", "layout", "threads", "few"}:
            assert not torch.equal(inside, before)
    assert model.settings == settings
    assert torch.equal(model.forward(IDS), before)


def test_override_nests_and_survives_exceptions(model: Model) -> None:
    before = model.forward(IDS)
    with pytest.raises(ZeroDivisionError), model.override(top_k=2, quantize="q4_0"):
        with model.override(top_k=3, attention="naive"):
            assert model.layers[1].router.rule == FixedK(3)
            assert model.layers[1].experts.format == "q4_0"
        assert model.layers[1].router.rule == FixedK(2)
        assert model.layers[1].attention.form == "absorbed"
        raise ZeroDivisionError
    assert torch.equal(model.forward(IDS), before)


def test_a_switch_set_on_the_stage_is_the_same_switch(model: Model) -> None:
    with model.override(top_k=2):
        expected = model.forward(IDS)
    twin = model.clone()
    for layer in twin.config.moe_layers:
        twin.layers[layer].router.rule = FixedK(2)
    assert torch.equal(twin.forward(IDS), expected)
    assert model.layers[1].router.rule == FixedK(4)  # the clone has switches of its own


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, "top_k = 0; expected 1 to 8"),
        ({"top_k": 17}, "top_k = 17; expected 1 to 8"),
        ({"top_k": 2.5}, "whole number"),
        ({"top_k": {0: 2}}, r"layers \[0\] cannot take it; it applies to layers \[1, 2\]"),
        ({"attention": "absorbd"}, 'did you mean "absorbed"'),
        ({"backend": "cuda"}, "backend 'cuda' is unknown"),
        ({"layout": "tiles"}, "expected one of auto, ggml_blocks, packed"),
        ({"isa": "avx2", "backend": "torch"}, "no such combination"),
        ({"threads": 0}, "threads = 0"),
        ({"numa": 77}, "numa = 77: there is no such node"),
        ({"layout": {0: "packed"}}, r"layout: \[0\] cannot take it; expected layers with experts"),
        ({"format": "q4_0", "quantize": "q4_0"}, "two names of one switch"),
        ({"quantize": {"expert": "q4_0"}}, 'did you mean "experts"'),
        ({"quantize": "q4_9"}, "q4_9"),
        ({"mask": [1, 2]}, "layer by layer"),
        ({"topk": 3}, "unknown switches"),
    ],
)
def test_impossible_switches_change_nothing(model: Model, changes: dict, message: str) -> None:
    before, settings = model.forward(IDS), model.settings
    with (
        pytest.raises(ValueError, match=message),
        model.override(attention="naive", **changes)
        if "attention" not in changes
        else model.override(**changes),
    ):
        pass
    assert model.settings == settings
    assert torch.equal(model.forward(IDS), before)


def test_a_numba_backend_that_cannot_is_refused_at_once(model: Model) -> None:
    with pytest.raises(SettingError, match="numba cannot compute q5_1: .*no Numba kernel.*convert"):
        with model.override(quantize="q5_1", backend="numba"):
            pass
    assert model.layers[1].experts.format == "q8_0"


def test_chunks_and_steps_equal_one_pass(model: Model) -> None:
    # In float32 throughout: native kernels round differently for few tokens and for many.
    with model.override(backend="torch"):
        whole = model.forward(IDS)
    for form in ("absorbed", "naive"):
        with model.override(attention=form, backend="torch"):
            cache = model.new_cache(context=len(IDS))
            parts = [model.forward(IDS[a:b], cache) for a, b in ((0, 1), (1, 40), (40, 60))]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)
        assert cache.lengths_B.tolist() == [60]


def test_cache_bytes_are_what_is_allocated(model: Model) -> None:
    for form in ("absorbed", "naive"):
        with model.override(attention=form):
            cache = model.new_cache(batch=2, context=50)
            each = sum(block.attention.cache_bytes_per_token() for block in model.layers)
        assert cache.nbytes == 2 * 50 * each


def test_a_cache_of_the_other_form_is_refused(model: Model) -> None:
    cache = model.new_cache(context=8)
    with model.override(attention="naive"), pytest.raises(SettingError, match="make a new cache"):
        model.forward(IDS[:4], cache)
    assert model.forward(IDS[:4], cache).shape == (4, 272)


def test_context_errors_leave_the_model_usable(model: Model) -> None:
    with pytest.raises(ContextError, match="empty"):
        model.generate("")
    with pytest.raises(ContextError, match="at least 1 token"):
        model.forward([])
    with pytest.raises(ContextError, match="has 0 to 271"):
        model.forward([3, 272])
    with pytest.raises(ContextError, match="float32: expected whole numbers"):
        model.forward(torch.tensor([3.5, 2]))
    with pytest.raises(ContextError, match="513 tokens.*512"):
        model.generate(torch.zeros(513, dtype=torch.int64))
    with pytest.raises(ContextError, match="do not fit the cache of 4"):
        model.forward(IDS, model.new_cache(context=4))
    with pytest.raises(ContextError, match="a cache for 2"):
        model.forward(IDS, model.new_cache(batch=2))
    with pytest.raises(TypeError, match="encode the text"):
        model.forward("text")  # type: ignore[arg-type]
    assert model.forward(IDS).shape == (60, 272)


def test_out_of_memory_is_said_before_it_happens(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    class Little:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    with pytest.raises(ContextError, match="needs .* 1000 B of memory are available"):
        model.new_cache(context=512)
    monkeypatch.undo()
    assert model.new_cache(context=512).context == 512


def test_a_dense_layer_says_that_it_is_dense(model: Model) -> None:
    for stage in ("router", "experts", "shared"):
        with pytest.raises(StageError, match="layer 0 of tiny-test is dense.*1 to 2"):
            getattr(model.layers[0], stage)
    assert not hasattr(model.layers[0], "router")


def test_greedy_streaming_sampling_and_seed(model: Model) -> None:
    greedy = model.generate("hello", max_new_tokens=9, stop_at_eos=False)
    assert len(greedy.ids) == 9
    ids = model.tokenizer.encode("hello") + list(greedy.ids)
    assert model.forward(ids)[len(ids) - 10 : -1].argmax(-1).tolist() == list(greedy.ids)

    def sampled(seed: int, top_p: float = 0.9) -> tuple[int, ...]:
        return model.generate(
            "hello", max_new_tokens=9, temperature=1.0, top_p=top_p, seed=seed, stop_at_eos=False
        ).ids

    assert sampled(1) == sampled(1) != sampled(2)
    assert sampled(1, top_p=1e-9) == greedy.ids  # the nucleus is the best token alone


def test_streaming_can_be_cancelled(model: Model) -> None:
    cancel, seen = threading.Event(), 0
    for _ in model.stream("hello", max_new_tokens=50, cancel=cancel, stop_at_eos=False):
        seen += 1
        if seen == 3:
            cancel.set()
    assert seen == 3


def test_sampling_values_are_checked(model: Model) -> None:
    with pytest.raises(SettingError, match="max_new_tokens = 0.*temperature = -1.*top_p = 2"):
        model.generate("x", max_new_tokens=0, temperature=-1, top_p=2)


def test_probe_sees_every_stage_and_changes_nothing(model: Model) -> None:
    recorder = Recorder(("*",))
    watched = model.forward(IDS, probe=recorder, chunk=25)
    assert torch.equal(watched, model.forward(IDS, chunk=25))
    arrays = recorder.joined()
    assert all(len(values) == 60 for values in arrays.values())
    assert {"embedding", "norm", "logits", "layers.0.mlp.output", "layers.2.hidden"} <= set(arrays)
    torch.testing.assert_close(arrays["logits"], watched)
    parts = [arrays[f"layers.2.{name}.output"] for name in ("attention", "experts", "shared")]
    torch.testing.assert_close(sum(parts) + arrays["layers.1.hidden"], arrays["layers.2.hidden"])
    assert all(seconds > 0 for seconds in recorder.seconds.values())


def test_trace(model: Model) -> None:
    trace = model.trace("some text", domain="prose")
    assert trace["layers.1.router.ids"].shape == (len(trace), 4)
    assert trace.domains == ("prose",)
    with pytest.raises(TraceError, match="no activation matches"):
        model.trace("some text", names="layers.9.*")
    other = Model(synthesize(TINY_V2_CONFIG)).trace("some text")
    with pytest.raises(TraceError):
        trace.merge(other)


def test_a_trace_holds_no_logits_that_nobody_asked_for(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = list(range(1, 4))  # so few that whole and in pieces they take the same kernels
    assert "output" in model.trace(ids).stages, "stage times are whole by default"
    sizes, head = [], Model._head

    def counted(self: Model, hidden_BTD: torch.Tensor, probe: Probe) -> torch.Tensor:
        sizes.append(hidden_BTD.shape[1])
        return head(self, hidden_BTD, probe)

    monkeypatch.setattr(Model, "_head", counted)
    monkeypatch.setattr(model_module, "HEAD_TOKENS", 2)
    model.trace(ids, names="layers.*.router.ids")
    assert not sizes
    logits_TV = torch.from_numpy(model.trace(ids, names=["logits"])["logits"])
    assert sizes == [2, 1]
    torch.testing.assert_close(logits_TV, model.forward(ids))


def test_cost_counts_what_the_shapes_say(model: Model) -> None:
    c = TINY_TEST_CONFIG
    stages = model.cost(tokens=1, context=100).by_stage()
    assert stages["experts"].flop == 2 * (2 * 4 * 3 * c.hidden_size * c.expert_size)
    assert stages["experts"].weight_bytes == pytest.approx(
        2 * 4 * model.layers[1].experts.expert_bytes
    )
    with model.override(top_k=2):
        assert model.cost(1, 100).by_stage()["experts"].flop == stages["experts"].flop / 2
    with model.override(attention="naive"):
        naive = model.cost(1, 100).by_stage()["attention"]
    assert naive.cache_bytes > stages["attention"].cache_bytes
    assert model.cost(512, 512).flop > 400 * model.cost(1, 1).flop
    assert model.cost().to_frame()["flop"].sum() == model.cost().flop


def test_reprs_show_what_matters_and_escape(model: Model) -> None:
    text = repr(model)
    assert "16 experts" in text and "trained k = 4" in text
    assert "set to: as trained, experts in q8_0" in text
    block = model.layers[1]
    for item in (
        model,
        block,
        block.router,
        block.experts,
        block.attention,
        model.cost(),
        block.experts.explain(),
        model.new_cache(context=4),
    ):
        bundle = item._repr_mimebundle_()
        assert bundle["text/plain"] == repr(item)
        assert bundle["text/html"].count("<table") == bundle["text/html"].count("</table>")
    generation = model.generate("<b>", max_new_tokens=2)
    assert "<b>" not in generation._repr_mimebundle_()["text/html"]


def test_without_a_tokenizer_text_is_refused() -> None:
    from dataclasses import replace

    silent = Model(synthesize(replace(TINY_TEST_CONFIG, vocab_size=100)))
    with pytest.raises(CheckpointError, match="no tokenizer"):
        silent.generate("text")
    assert silent.forward([1, 2]).shape == (2, 100)


def test_one_layer_in_another_format(model: Model) -> None:
    with model.override(format={1: "q4_0"}, backend={2: "torch"}):
        assert [b.experts.format for b in model.moe_blocks][:2] == ["q4_0", "q8_0"]
    with pytest.raises(SettingError, match="component 0 is unknown; .* layers with experts"):
        model.set(format={0: "q4_0"})


def test_other_words_leave_small_matrices_packed(model: Model) -> None:
    """A second choice is made as the first one was."""
    bank, matrix = model.layers[1].experts, model.layers[1].attention.weights.output
    before = bank.kernel.layout, matrix.kernel.layout
    with model.override(threads=1):
        assert (bank.kernel.layout, matrix.kernel.layout) == before
        assert bank.kernel.layout == bank.explain().chosen.layout


def test_requantizing_is_done_once_for_all_clones(model: Model) -> None:
    seen = []
    for twin in (model, model.clone(), model.clone()):
        with twin.override(quantize={"experts": "q5_1", "attention": "q5_1"}, backend="numpy"):
            block = twin.layers[1]
            assert block.experts.backend == "numpy"
            seen.append((block.experts.gate, block.attention.weights.q_b.weight))
    assert all(gate is seen[0][0] and q_b is seen[0][1] for gate, q_b in seen)


def test_nested_requantizing_starts_from_the_stored_weights(model: Model) -> None:
    both = {"experts": "q5_0", "attention": "q5_0"}
    with model.override(quantize=both):
        direct = model.forward(IDS)
    twin = model.clone()
    with twin.override(quantize={"experts": "q4_0", "attention": "q4_0"}):
        coarse = twin.forward(IDS)
        with twin.override(quantize=both):
            assert torch.equal(twin.forward(IDS), direct)
        with twin.override(quantize={"experts": "q8_0", "attention": "q8_0"}):
            assert torch.equal(twin.forward(IDS), model.forward(IDS))
        assert torch.equal(twin.forward(IDS), coarse)


def test_few_requantized_banks_are_kept(model: Model) -> None:
    bank = model.layers[1].experts
    for format in ("q4_0", "q4_1", "q5_0", "q5_1"):
        bank.quantized(format)
    assert list(bank._requantized) == ["q5_0", "q5_1"]


def test_switches_reach_every_matrix_or_those_that_are_named(model: Model) -> None:
    with model.override(backend="numpy"):
        settings = model.settings
        assert set(settings.kernel.values()) == {"numpy BLAS's choice, ggml_blocks"}
        assert set(settings.matrices) == {"attention", "dense", "shared", "output"}
        assert set(settings.matrices.values()) == {"numpy BLAS's choice, ggml_blocks"}
        assert "backend numpy" in str(settings)
    with model.override(backend={"shared": "torch", 2: "numpy"}):
        assert [bank.kernel.backend for bank in model.experts][1] == "numpy"
        assert model.settings.matrices["shared"].startswith("torch")
        assert model.experts[0].backend == "auto"
        assert model.output.backend == "auto"


def test_a_clone_has_kernels_of_its_own_for_every_matrix(model: Model) -> None:
    settings = model.settings
    twin = model.clone()
    twin.set(backend="numpy")
    assert model.settings == settings != twin.settings
    assert (twin.forward(IDS) - model.forward(IDS)).abs().median() < 0.1


def test_experts_are_switched_together(model: Model) -> None:
    twin = model.clone()
    twin.experts.use(backend="numpy", format="q4_0")
    assert twin.experts[0].format == "q4_0" and model.experts[0].format == "q8_0"
    assert twin.settings.matrices == model.settings.matrices, "the experts alone"
    assert "numpy" in repr(twin.experts) and len(twin.experts.explain()) == 1


def test_settings_say_what_computes_and_go_to_json(model: Model) -> None:
    import json

    with model.override(backend="numba", layout="packed", threads=1, few=3):
        found = model.settings.to_dict()
    assert found["backend"] == "numba" and found["layout"] == "packed" and found["isa"] == "auto"
    assert found["kernel"] == "numba LLVM's choice, packed, 1 thread, few 3"
    assert json.loads(json.dumps(found)) is not None
    assert model.trace("some text").settings["kernel"] == model.settings.to_dict()["kernel"]
