"""The live view of notebook 07: it answers, says what is wrong, applies and undoes."""

import pytest
from torch import Tensor

from ktlab.checkpoint.synthesis import TINY_TEST_CONFIG, synthesize
from ktlab.errors import RuleError
from ktlab.kernels.seat import TorchSeat
from ktlab.model.model import Model
from ktlab.model.place_room import needed_bytes
from ktlab.notebook import rules_view
from ktlab.notebook.rules_tables import fitting, near_frame, problems_html
from ktlab.notebook.rules_view import OWN_TEXT, RulesView
from ktlab.placement import Placement
from ktlab.placement.rules import RuleSet
from ktlab.routing import Router

pytestmark = pytest.mark.usefixtures("no_gpu")
TEXTS = {"one": "It was the best of times,\nit was the worst of times,\n" * 8}


class Near(Router):
    near: list[int]
    bonus = 10.0

    def choice(self, scores_TE: Tensor) -> Tensor:
        choice_TE = super().choice(scores_TE).clone()
        choice_TE[:, self.near] += self.bonus
        return choice_TE


def near(bonus: float = 10.0) -> str:
    return (
        "- match: {name: 'mlp\\.gate$'}\n"
        f"  replace: {{class: Near, kwargs: {{near: [1, 2], bonus: {bonus}}}}}\n"
    )


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(synthesize(TINY_TEST_CONFIG, formats="q8_0"))


@pytest.fixture
def view(model: Model):
    made = RulesView(model, TEXTS, rules={"near": near()}, classes=[Near])
    assert made.wait(60).error == ""
    yield made
    made.close()


def test_a_preview_at_once_and_nothing_changed(view: RulesView, model: Model) -> None:
    assert view.preview is not None and view.preview.rows[0].status == "changes"
    assert "Router → Near(near=[1, 2], bonus=10.0)" in view.table.value
    assert view.applied is None and view.undo_button.disabled
    assert view.model.settings == model.settings
    assert "2 modules would change" in view.status.value
    view.start_choice.value = "gpu-attention"
    view.wait(60)
    assert view.preview.source == "gpu-attention"
    assert "layer 1, attention: cuda:0" in view.table.value, "in the grid"
    assert "asks for cuda:0" in view.table.value and "4 modules" not in view.note
    view.stand_in_box.value = True
    view.wait(60)
    assert "asks for" not in view.table.value and "cpu → cuda:0" in view.table.value
    view.apply()
    view.wait(60)
    assert view.error == "" and view.model.placement is not None and "placed on" in view.state.value
    assert view.quality is not None and not view.quality.identical


def test_applied_and_undone(view: RulesView, model: Model) -> None:
    before = model.settings
    view.apply_button.click()
    assert view.wait(60).error == ""
    assert isinstance(view.model.layers[1].router, Near)
    assert view.quality is not None and view.quality.done
    assert "Near(near=[1, 2]" in view.state.value and "KL divergence" in view.summary.value
    shown = view.snapshot().html
    assert "KL divergence" in shown and "mlp" in shown and "<script" not in shown
    view.start_choice.value = "torch-reference"  # instead of what is set, not on top of it
    view.apply_button.click()
    assert view.wait(60).error == "" and view.applied is not None
    assert view.applied.source == "torch-reference"
    assert type(view.model.layers[1].router) is Router and view.model.experts[0].backend == "torch"
    view.undo_button.click()
    view.wait(60)
    assert view.applied is None and view.model.settings == before == model.settings
    assert view.undo_button.disabled and view.summary.value == ""


def test_of_a_slow_class_one_window_is_read(
    view: RulesView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules_view, "PATIENCE_S", 0.0)
    view.apply_button.click()
    assert view.wait(60).error == "" and view.quality is not None
    assert view.quality.tokens < view.quality.total_tokens
    assert view.note.startswith(f"{view.quality.tokens} of {view.quality.total_tokens}")


def test_wrong_rules_are_shown_with_their_lines(view: RulesView) -> None:
    view.set("- match: {name: '(gate'}\n  replace: {class: Naer, kwargs: {near: [1]}}\n<b>")
    view.wait(60)
    assert view.start_choice.value == OWN_TEXT and view.apply_button.disabled
    assert "<b>" not in view.table.value.replace('<b class="t"', "")
    view.set("- match: {name: '(gate'}\n  replace: {class: Naer, kwargs: {near: [1]}}\n")
    view.wait(60)
    assert view.error == "" and "2 problems" in view.table.value
    assert "did you mean &quot;Near&quot;?" in view.table.value
    view.apply()
    assert "is unknown" in view.wait(60).error, "asked for all the same"
    view.set(near().replace("[1, 2]", "[99]"))
    view.wait(60)
    assert "IndexError" in view.table.value and not view.apply_button.disabled
    view.apply()
    assert "nothing was changed" in view.wait(60).error and view.applied is None


def test_problems_point_at_the_column() -> None:
    text = "- match: {name: a}\n  replace: {clas: default}\n"
    with pytest.raises(RuleError) as caught:
        RuleSet.parse(text)
    page = problems_html(caught.value, text)
    assert f"   2    replace: {{clas: default}}\n{' ' * 18}^" in page


def test_what_it_costs_to_stay_near(model: Model) -> None:
    frame = near_frame(
        model, TEXTS["one"], [1, 2], lambda b: RuleSet.parse(near(b), classes=[Near]), [0.0, 10.0],
        max_tokens=64,
    )  # fmt: skip
    assert frame["KL divergence"][0.0] == "0" and frame["KL divergence"][10.0] != "0"
    assert frame["slots near"][10.0] == "50\xa0%", "all that can go there do"
    assert "±" in frame["slots near"][0.0] or "[" in frame["slots near"][0.0]


def test_a_stand_in_gets_the_first_layers_that_it_has_room_for(model: Model) -> None:
    whole = RuleSet.read("hot-experts").placement(model)
    assert fitting(model, whole) == whole

    def needed(placement: Placement) -> int:
        return needed_bytes(model, placement, {"cuda:0": TorchSeat("cuda:0", "cpu")})["cuda:0"]

    part = fitting(model, whole, needed(whole) - 1)
    assert 0 < needed(part) < needed(whole)
    first, last = range(model.config.num_layers)[:: model.config.num_layers - 1]
    assert part.device("attention", layer=first) == "cuda:0"
    assert part.device("attention", layer=last) == part.device("output") == "cpu"
    with model.override(placement=part, stand_in={"cuda:0": "cpu"}):
        model.forward([1, 2, 3])
    assert fitting(model, whole, 0).devices == ("cpu",)
