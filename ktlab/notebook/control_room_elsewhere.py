"""The panel of another machine: measured here, predicted there, side by side and never mixed."""

from functools import lru_cache, partial

from ktlab.checkpoint.facts import read_facts
from ktlab.errors import KtlabError, SettingError
from ktlab.html import Raw, quantity, text
from ktlab.measurement.synthetic import shapes
from ktlab.model.model import Model
from ktlab.notebook.control_room_choice import Choice
from ktlab.notebook.control_room_html import EMPTY, number, panel_title, tile
from ktlab.notebook.control_room_kernels import OFF
from ktlab.notebook.control_room_results import Results
from ktlab.placement import prediction_view
from ktlab.placement.listed import machine_names
from ktlab.placement.machine import THIS
from ktlab.placement.predict import PHASES, Prediction, predict
from ktlab.placement.presets import Preset

MACHINES = (OFF, *(name for name in machine_names() if name != THIS))
"""Another than this one: here it is measured."""
WHY = (
    "Choose a machine that you do not have: a model of it, checked against published measurements, "
    "says what to expect. With a true-size twin chosen, of that model; else of this one."
)
PROMPT, GENERATE = 512, 128
WITH_GPU = "ktransformers-0.2.1"


def subject(model: Model, shape: str) -> str:
    """What the prediction is of: the twin's model, or the room's own."""
    if shape != OFF and shape in shapes():
        return shape
    if model.checkpoint.path is None:
        raise SettingError(f"{model.name} is in no file; choose a true-size twin to predict that")
    return str(model.checkpoint.path)


def prediction(
    model: Model, choice: Choice, machine: str, shape: str, results: Results | None = None
) -> Prediction:
    """What the panel shows; a token takes the setting's experts, or where a rule decides as many
    as it took in `results`, rounded. Raises as `ktlab.predict` does."""
    mean = taken(choice, results)
    top_k = choice.top_k if mean is None else max(1, round(mean))
    return _predicted(subject(model, shape), machine, top_k, choice.placement)


def taken(choice: Choice, results: Results | None) -> float | None:
    """Experts a token took under a rule, over all layers; None where k is fixed, or as long as
    nothing is measured."""
    found = results.histogram if results and choice.rule != "fixed k" else None
    if found is None or not found.tokens:
        return None
    return float(found.after_LE.sum()) / (found.tokens * len(found.layers))


@lru_cache(maxsize=64)
def _predicted(name: str, machine: str, top_k: int, preset: str) -> Prediction:
    """With parts on a GPU of KTransformers, whose speeds there were published; else of this kit."""
    asked = partial(predict, name, machine=machine, top_k=top_k, prompt=PROMPT, generate=GENERATE)
    if preset == "cpu":
        return asked()
    return asked(engine=WITH_GPU, placement=Preset(preset).of(read_facts(name).config))


def elsewhere_title(machine: str) -> str:
    """Says which number is none of this machine's."""
    badge = "" if machine == OFF else "predicted, not measured"
    return panel_title("another machine", machine if machine != OFF else "off", badge)


def elsewhere(
    model: Model, results: Results | None, choice: Choice, machine: str, shape: str
) -> str:
    """Two groups of tiles: this machine's measurement, the other one's prediction."""
    if machine == OFF:
        return f'<div class="cr-twin cr-grey">{WHY}</div>'
    try:
        found = prediction(model, choice, machine, shape, results)
    except KtlabError as error:
        return f'<div class="cr-twin cr-error" role="alert">no prediction: {text(error)}</div>'
    experts, mean = f"{found.top_k} experts a token", taken(choice, results)
    if mean is not None:
        experts += f" (the rule took {mean:.1f} here)"
    elif choice.rule != "fixed k":
        experts += " (the most that the rule may take)"
    return (
        f'<div class="cr-twin" data-machine="{text(machine)}">'
        f'<div class="cr-grey"><b>measured here</b>, {text(model.name)}, '
        f"{text(choice.label)}</div>{_here(results)}"
        f'<div class="cr-grey"><b>predicted there</b>, {text(found.model)}'
        f" in {text(found.format)}, {experts}, {text(machine)}, engine "
        f"{text(found.engine)}</div>{_there(found)}{_notes(found)}</div>"
    )


def _here(results: Results | None) -> str:
    speed = results.speed if results else None
    rows = []
    for phase in PHASES:
        body: object = EMPTY
        title = "measured after the quality"
        if speed is not None:
            now = speed.speeds.get("now", speed.speeds["baseline"])
            measured = getattr(now, phase).tokens_per_s
            body, title = Raw(number(measured)), f"{measured.method}. Here: room.results.speed"
        rows.append(tile(f"here_{phase}", f"{phase}, measured", body, title))
    return f'<div class="cr-tiles">{"".join(rows)}</div>'


def _there(found: Prediction) -> str:
    rows = []
    for phase in PHASES:
        value = getattr(found, f"{phase}_tokens_per_s")
        tokens = f"{PROMPT} tokens" if phase == "prefill" else f"after {PROMPT} tokens"
        body = Raw(
            f'<span class="cr-value">{prediction_view.about(value)}</span> '
            f'<span class="cr-spread">tokens/s</span><div class="cr-grey">waits for '
            f"{text(_once(found.bound(phase)))}</div>"
        )
        title = f"A model of the machine, {tokens}. Here: room.prediction.times[{phase!r}]"
        rows.append(tile(f"there_{phase}", f"{phase}, predicted", body, title))
    return f'<div class="cr-tiles">{"".join(rows)}</div>'


def _once(bound: str) -> str:
    """ "experts, memory"; "launch" where stage and bound have one name."""
    return ", ".join(dict.fromkeys(bound.split(", ")))


def _notes(found: Prediction) -> str:
    sizes = ", ".join(f"{device} {quantity(n, 'B')}" for device, n in found.memory.items())
    said = "".join(f"; {note}" for note in (*(["fits"] if found.fits else []), *found.notes))
    call = f"ktlab.predict({found.model!r}, machine={found.machine!r}, engine={found.engine!r}"
    call += f", top_k={found.top_k}, prompt={PROMPT}, generate={GENERATE})"
    return (
        f'<div class="cr-grey">{text(sizes)}{text(said)}. {text(call)}; how well it agrees '
        "with what was published: ktlab predict --published. Two machines, two numbers: their "
        "ratio says nothing about either.</div>"
    )
