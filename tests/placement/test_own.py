"""Classes of the user's in the place of a router, experts, an attention: every instrument stays."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ktlab
from ktlab.attention import MLA, Attention
from ktlab.checkpoint.synthesis import TINY_QWEN3MOE_CONFIG, TINY_TEST_CONFIG
from ktlab.errors import RuleError, SettingError
from ktlab.experts import ExpertBank
from ktlab.model.model import Model
from ktlab.notebook.generation_view import GenerationView
from ktlab.notebook.offload_view import OffloadView
from ktlab.notebook.router_view import RouterView
from ktlab.placement.rules import RuleSet
from ktlab.routing import Router
from tests.placement.test_rules import IDS, checkpoint

GATES, BANKS, ATTENTIONS = "mlp\\.gate$", "mlp\\.experts$", "self_attn$"


class Near(Router):
    """Prefers some experts."""

    near: list[int]
    bonus = 10.0

    def choice(self, scores_TE: Tensor) -> Tensor:
        preferred_TE = torch.zeros_like(scores_TE)
        preferred_TE[:, self.near] = self.bonus
        return super().choice(scores_TE) + preferred_TE


class ByHand(ExpertBank):
    """One expert after the other, from the formula."""

    def forward(self, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        output_TD = torch.zeros_like(hidden_TD)
        for expert in ids_TK.unique().tolist():
            gate, up, down = (
                torch.from_numpy(w[expert].dequantize()) for w in (self.gate, self.up, self.down)
            )
            weight_T = (weights_TK * (ids_TK == expert)).sum(-1)
            inner_TF = F.silu(hidden_TD @ gate.T) * (hidden_TD @ up.T)
            output_TD += weight_T[:, None] * (inner_TF @ down.T)
        return output_TD


class Deaf:
    """Hears nothing of other tokens; of no class of ours, and whatever kind stands there."""

    def __init__(self, loudness: float = 0.0) -> None:
        self.loudness = loudness

    def forward(self, hidden_BTD, cache, positions_BT, probe):
        return self.loudness * super().forward(  # type: ignore[misc]
            hidden_BTD, cache, positions_BT, probe
        )


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(checkpoint(TINY_TEST_CONFIG))


def rules(name: str, cls: type, kwargs: str = "", **classes: type) -> RuleSet:
    text = (
        f"- match: {{name: '{name}'}}\n  replace: {{class: {cls.__name__}, kwargs: {{{kwargs}}}}}"
    )
    return RuleSet.parse(text, classes=classes or [cls])


def test_a_router_of_ten_lines_and_every_instrument(model: Model) -> None:
    near = rules(GATES, Near, "near: [3, 5]")
    before, settings = model.forward(IDS), model.settings
    (row,) = near.preview(model).rows
    assert (row.status, row.change) == ("changes", "Router -> Near(near=[3, 5])")
    change = near.apply(model)
    router = model.layers[1].router
    assert isinstance(router, Near) and repr(router).startswith("Near(layer 1: 16 experts")
    assert model.settings.own["layers.2.router"].startswith("Near(near=[3, 5])#")
    assert "router Near(near=[3, 5])" in str(model.settings) and "Near" in repr(model.layers[1])
    assert not near.preview(model).changes, "it stands there already"

    trace = model.trace(IDS)
    loads = trace.routing.histogram(layer=2).counts_E
    assert loads[3] == loads[5] == len(IDS) and loads.sum() == len(IDS) * model.config.top_k
    assert "Near" in str(trace.settings)
    with model.override(top_k=1, mask={1: [3]}):  # the router's own switches, untouched
        ids_T1 = model.trace(IDS)["layers.1.router.ids"]
        assert ids_T1.shape == (len(IDS), 1) and (ids_T1 == 5).all()
    twin = model.clone()
    assert isinstance(twin.layers[1].router, Near) and twin.layers[1].router is not router
    assert torch.equal(twin.forward(IDS), model.forward(IDS))
    assert len(model.experts.explain()) and model.cost().flop > 0
    generated = model.generate(IDS[:8], max_new_tokens=4)
    assert generated.ids == model.generate(IDS[:8], max_new_tokens=4).ids
    for instrument in (RouterView, OffloadView, GenerationView):
        view = instrument(model, {"text": "def f(x): return x\n" * 8})
        assert view.wait(60).error == "" and view.snapshot().html
        assert view.model.settings.own == model.settings.own
        view.close()
    change.undo()
    assert type(model.layers[1].router) is Router and model.settings == settings
    assert torch.equal(model.forward(IDS), before)


def test_rules_are_a_switch_as_others_are(model: Model) -> None:
    near, settings = rules(GATES, Near, "near: [3, 5]"), model.settings
    found = ktlab.compare(model, IDS.repeat(8), a={}, b=dict(rules=near, top_k=3), speed=False)
    assert found.label_b == "rules=RuleSet(rules, 1 rules), top_k=3"
    assert found.quality.kl_mean.value > 0.0001
    assert "Near" in str(found.b) and "Near" not in str(found.a)
    with model.override(rules=RuleSet.read("torch-reference"), backend={"experts": "numba"}):
        assert model.experts[0].backend == "numba", "what is named beside rules counts more"
        assert model.output.backend == "torch"
    with pytest.raises(SettingError, match="expected a RuleSet, such as ktlab.RuleSet.read"):
        model.set(rules="cpu-experts")
    with pytest.raises(SettingError), model.override(rules=near, top_k=99):
        pass
    assert model.settings == settings


def test_experts_by_hand_are_the_kernels(model: Model) -> None:
    before = model.forward(IDS)
    with rules(BANKS, ByHand).applied(model):
        assert torch.allclose(model.forward(IDS), before, atol=2e-2)
        assert not torch.equal(model.forward(IDS), before)
        bank = model.experts[0]
        assert "ByHand(layer 1: 16 experts" in repr(bank) and len(model.experts.explain())
        assert "k = 4, ByHand, your own" in repr(model)
        with model.override(format="q4_0"):  # still the user's class, on other weights
            assert isinstance(model.experts[0], ByHand) and model.experts[0].format == "q4_0"
        cache = model.new_cache(context=len(IDS))
        pieces = [model.forward(IDS[at : at + 1], cache) for at in range(len(IDS))]
        assert torch.allclose(torch.cat(pieces), before, atol=2e-2), "decoding takes it, too"
    assert type(model.experts[0]) is ExpertBank


@pytest.mark.parametrize("config", [TINY_TEST_CONFIG, TINY_QWEN3MOE_CONFIG], ids=lambda c: c.name)
def test_a_class_of_no_base_for_both_kinds_of_attention(config) -> None:
    model = Model(checkpoint(config))
    before = model.forward(IDS)
    with rules(ATTENTIONS, Deaf, "loudness: 1.0").applied(model):
        assert torch.equal(model.forward(IDS), before)
        assert repr(model.layers[0].attention).startswith("Deaf(layer 0: ")
    with rules("layers.0.self_attn$", Deaf).applied(model):
        own = model.trace(IDS, names="layers.0.attention.output")["layers.0.attention.output"]
        assert own.any(), "recorded by the stage before it is silenced"
        assert not torch.equal(model.forward(IDS), before)
        twin = model.clone()
        with twin.override(quantize={"attention": "q4_0"}):
            assert vars(twin.layers[0].attention)["loudness"] == 0.0
            assert twin.settings.own == {"layers.0.attention": model.layers[0].attention.own}


def test_redefined_in_another_cell(model: Model) -> None:
    """Its settings differ, so that no baseline of the first definition is taken for the second."""

    def define(bonus: float) -> type:
        class Again(Router):
            def choice(self, scores_TE: Tensor) -> Tensor:
                return super().choice(scores_TE) + scores_TE * bonus

        return Again

    first, second = (rules(GATES, define(bonus)) for bonus in (0.0, 0.0))

    class Again(Router):
        def choice(self, scores_TE: Tensor) -> Tensor:
            return -scores_TE

    found = []
    for each in (first, second, rules(GATES, Again)):
        with each.applied(model):
            found.append(model.settings.own["layers.1.router"])
    assert found[0] == found[1] != found[2] and found[2].startswith("Again()#")
    with first.applied(model), rules(GATES, Again).applied(model):
        assert (model.layers[1].router.choice(torch.ones(1, 16)) == -1).all()


def test_dataclasses_and_rules_that_replace_again(model: Model) -> None:
    @dataclass(frozen=True)
    class Fixed:
        take: list = field(default_factory=lambda: [0])

        def choice(self, scores_TE: Tensor) -> Tensor:
            choice_TE = super().choice(scores_TE) - 100  # type: ignore[misc]
            choice_TE[:, self.take] = 100
            return choice_TE

    with rules(GATES, Near, "near: [1]").applied(model):
        (row,) = rules(GATES, Fixed, "take: [7]").preview(model).rows
        assert row.change == "Near(near=[1]) -> Fixed(take=[7])"
        with rules(GATES, Fixed, "take: [7]").applied(model), model.override(top_k=1):
            assert (model.trace(IDS)["layers.1.router.ids"] == 7).all()
        assert isinstance(model.layers[1].router, Near)
    assert type(model.layers[1].router) is Router


def test_what_a_file_says_of_classes(model: Model) -> None:
    text = (
        "- match: {name: gate}\n  replace: {class: __main__.Naer, kwargs: {near: [1]}}\n"
        "- match: {name: gate}\n  replace: {class: Near, kwargs: {nera: [1]}}\n"
        "- match: {name: gate}\n  replace: {class: Deaf, kwargs: {loudness: 1, device: x}}\n"
    )
    with pytest.raises(RuleError) as caught:
        RuleSet.parse(text, classes={"Near": Near, "Deaf": Deaf})
    lines = str(caught.value).splitlines()
    assert lines[0] == "rules: 3 problems"
    assert "line 2, column 20: replace class '__main__.Naer' is unknown; did you mean" in lines[1]
    assert (
        'Near takes no nera; did you mean "near"?; Near needs near; it takes near, bon' in lines[2]
    )
    assert "device: 'x' is no device" in lines[3]
    with pytest.raises(RuleError, match=r"'Near' is unknown; a class of your own is handed over"):
        RuleSet.parse(text.splitlines(keepends=True)[2] + text.splitlines()[3])
    with pytest.raises(RuleError, match="3 are no classes; expected such as classes="):
        RuleSet.parse(text, classes=[3])  # type: ignore[list-item]


class Wrong:
    """Nothing of a router."""

    explain = 3

    def forwrad(self, hidden_TD): ...


class TooMany(ExpertBank):
    def forward(self, hidden_TD, ids_TK):  # type: ignore[override]
        return hidden_TD


class Halves(Router):
    def forward(self, hidden_TD):
        found = super().forward(hidden_TD)
        return replace(found, ids_TK=found.ids_TK.float(), weights_TK=found.weights_TK[:, :1])


class Nothing(Attention):
    def attend(self, hidden_BTD, cache, positions_BT, probe):
        return None


class Fails(Router):
    def choice(self, scores_TE):
        return vars(self)["nowhere"]


class Sibling(MLA):
    def attend(self, hidden_BTD, cache, positions_BT, probe):
        return super().attend(hidden_BTD, cache, positions_BT, probe)


@pytest.mark.parametrize(
    ("name", "cls", "expected"),
    [
        (GATES, Wrong, r"model.layers.1-2.mlp.gate: Wrong has no forward\(self, hidden_TD\) or "
         r'choice\(self, scores_TE\); did you mean "forward"'),
        (BANKS, Wrong, "Wrong hides the stage's own explain"),
        (BANKS, TooMany, r"TooMany.forward: is called with \(hidden_TD, ids_TK, weights_TK\): too "
         r"many positional arguments; it takes \(self, hidden_TD, ids_TK\)"),
        (BANKS, Fails, "Fails is a kind of Router, there stands ExpertBank"),
        (GATES, Halves, r"Halves: ids_TK is \(2, 4\) of torch.float32; expected \(2, 4\) of torch."
         r"int64;\n.*Halves: weights_TK is \(2, 1\)"),
        (GATES, Fails, "Fails: KeyError: 'nowhere'"),
        (ATTENTIONS, Nothing, r"Nothing: what it returned is NoneType; expected a ten"),
    ],
)  # fmt: skip
def test_a_class_that_lacks_the_interface(model: Model, name, cls, expected) -> None:
    settings, found = model.settings, rules(name, cls)
    (row,) = found.preview(model).rows
    assert row.status == "not here" and row.missing
    with pytest.raises(RuleError, match=f"(?s)rules: nothing was changed on tiny-test.*{expected}"):
        found.apply(model)
    assert model.settings == settings


def test_where_a_class_cannot_stand_is_told(model: Model) -> None:
    (row,) = rules("norm$", Near, "near: [1]").preview(model).rows[-1:]
    assert row.missing[0].startswith("Near can stand for a router, a layer's routed experts, atte")
    grouped = Model(checkpoint(TINY_QWEN3MOE_CONFIG))
    with pytest.raises(RuleError, match="Sibling is a kind of MLA, there stands GQA"):
        rules(ATTENTIONS, Sibling).apply(grouped)
    with rules(ATTENTIONS, Sibling).applied(model):
        assert model.forward(IDS).isfinite().all()
