"""The control room: change a setting of a loaded model and see at once what it costs and buys.

>>> room = control_room(model)
>>> room                                  # the live view
>>> room.set(top_k=6); room.wait()
>>> room.results.quality.kl_mean          # what is shown is the object
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ktlab.checkpoint.embedded import domain_texts
from ktlab.errors import CheckpointError, KtlabError, SettingError, nearest
from ktlab.kernels.dispatch import Explanation
from ktlab.measurement.twin import Twin
from ktlab.model.model import Model
from ktlab.notebook.control_room_choice import OWN, Choice, Library
from ktlab.notebook.control_room_controls import Controls, State
from ktlab.notebook.control_room_elsewhere import MACHINES, prediction
from ktlab.notebook.control_room_engine import Engine, Options, Request
from ktlab.notebook.control_room_html import Snapshot
from ktlab.notebook.control_room_kernels import OFF, TWINS, explained
from ktlab.notebook.control_room_results import Point, Results, points
from ktlab.notebook.control_room_screen import Screen
from ktlab.placement.predict import Prediction

CHOICE_FIELDS = tuple(Choice.__dataclass_fields__)


def control_room(
    model: Model,
    *,
    text: str | None = None,
    texts: Mapping[str, str] | None = None,
    top_k: int | None = None,
    max_tokens: int = 8192,
    **options: Any,
) -> "ControlRoom":
    """Open a control room on `model`, which itself is never changed.

    `texts`: the texts on offer by name (default: the embedded held-out domains); `text`: the one
    to begin with, or a text of your own. `max_tokens` and `options` (fields of
    `control_room_engine.Options`) say how much is measured.
    """
    unknown = [name for name in options if name not in Options.__dataclass_fields__]
    if unknown:
        raise TypeError(f"unknown options {unknown}; expected {list(Options.__dataclass_fields__)}")
    if texts is None:
        try:
            texts = domain_texts()
        except CheckpointError:
            texts = {}
    measured = Options(max_tokens=max_tokens, **options)
    room = ControlRoom(model, Library(texts), measured, text=text)
    if top_k is not None:
        room.set(top_k=top_k)
    return room


class ControlRoom:
    """State, results and live view; see `control_room`."""

    def __init__(
        self, model: Model, library: Library, options: Options, *, text: str | None = None
    ) -> None:
        self.model = model
        self._engine = Engine(
            model,
            publish=self._publish,
            on_error=self._failed,
            on_busy=self._busy_changed,
            options=options,
        )
        self._lock = self._engine.worker.lock
        self.message = ""
        """The last complaint; empty when all is well."""
        self.phase = ""
        """What is being measured now; "done" when nothing is."""
        self._closed = False
        self._texts = library.domains
        own = text is not None and text not in library
        usual = "english" if "english" in library else next(iter(library))
        start = OWN if own or not library.domains else (text or usual)
        form = model.layers[0].attention.forms[0]
        trained = Choice(top_k=model.config.top_k, attention=form)
        self.state = State(
            choice=trained,
            baseline=trained,
            text=start,
            own_text=(text or "") if own else "",
            layer=model.moe_blocks[0].index,
        )
        self.controls = Controls(model, self._library(), self.state, self._asked)
        self.controls.stop.on_click(lambda _: self.stop() if self.busy else self.resume())
        self.controls.use.on_click(self._use_own_text)
        self.screen = Screen(model, self.controls)
        self._show(self.results)
        self.resume()

    # What is shown, as objects -----------------------------------------------------------------

    @property
    def results(self) -> Results | None:
        """Everything shown for the present setting; None until the first answer."""
        return self._engine.known(self._request())

    @property
    def tried(self) -> tuple[Results, ...]:
        """Every setting measured against this baseline on this text."""
        return self._engine.tried(self._request())

    @property
    def points(self) -> tuple[Point, ...]:
        """The tried settings in the plane of speed (over the baseline's) and KL divergence."""
        return points(self.tried, self.state.choice, self.state.phase, self.state.baseline)

    @property
    def front(self) -> tuple[Point, ...]:
        """The points that no other beats in both."""
        return tuple(point for point in self.points if point.on_front)

    @property
    def twin(self) -> Twin | None:
        """The true-size twin under the present settings; None while off or not measured."""
        found = self._engine.twin(self._request())
        return found if isinstance(found, Twin) else None

    @property
    def prediction(self) -> Prediction | None:
        """What is predicted for the chosen machine; None while that is off."""
        state = self.state
        if state.machine == OFF:
            return None
        return prediction(self.model, state.choice, state.machine, state.twin, self.results)

    @property
    def kernels(self) -> Explanation:
        """What computes the experts under the present setting, and why nothing else does."""
        return explained(self.model, self.state.choice)

    @property
    def text(self) -> dict[str, str]:
        """The text, or texts, being read."""
        return self._library().parts(self.state.text)

    @property
    def busy(self) -> bool:
        return self._engine.worker.busy

    @property
    def figures(self) -> dict[str, Any]:
        """The Plotly figures of what is known now: "router" and "plane"."""
        return self.screen.figures(self.results, self.points, self.state)

    # What can be done ----------------------------------------------------------------------------

    def set(self, **changes: Any) -> "ControlRoom":
        """Change what is chosen, as the buttons do.

        Fields of `Choice` (top_k, rule, threshold, attention, experts, layout, backend, isa,
        placement), text (a name on offer), own_text, baseline (a Choice, or "now"), layer, phase,
        twin (a real model's name, or "off"), machine (another one's name, or "off"). SettingError
        or ContextError if it cannot be; then nothing has changed.
        """
        with self._lock:
            if self._closed:
                raise SettingError("this control room is closed; open another: control_room(model)")
            before = self.state
            after = self._checked(changes)
            self.state, self.message = after, ""
            self.controls.show(after, [r.choice for r in self.tried])
            self.screen.message("")
            asked = ("choice", "baseline", "text", "own_text", "twin")
            if any(getattr(after, name) != getattr(before, name) for name in asked):
                self.resume()
            else:
                self._show(self.results)
        return self

    def _checked(self, changes: Mapping[str, Any]) -> State:
        known = (
            *CHOICE_FIELDS,
            "text",
            "own_text",
            "baseline",
            "layer",
            "phase",
            "twin",
            "machine",
        )
        unknown = [name for name in changes if name not in known]
        if unknown:
            raise SettingError(f"unknown {unknown}; the room can set {', '.join(known)}")
        rest = {k: v for k, v in changes.items() if k not in CHOICE_FIELDS}
        choice = {k: v for k, v in changes.items() if k in CHOICE_FIELDS}
        if choice:
            rest["choice"] = self.state.choice.with_(**choice).check(self._engine.model)
        if rest.get("baseline") == "now":
            rest["baseline"] = self.state.choice
        if "own_text" in rest:
            rest.setdefault("text", OWN)
        if rest.get("layer", self.state.layer) not in [b.index for b in self.model.moe_blocks]:
            layers = [b.index for b in self.model.moe_blocks]
            raise SettingError(
                f"layer {rest['layer']} has no router; the layers with one: {layers}"
            )
        if rest.get("twin", self.state.twin) not in TWINS:
            raise SettingError(
                f"twin = {rest['twin']!r}: expected one of {', '.join(TWINS)}"
                f"{nearest(str(rest['twin']), TWINS)}"
            )
        if rest.get("machine", self.state.machine) not in MACHINES:
            raise SettingError(
                f"machine = {rest['machine']!r}: expected one of {', '.join(MACHINES)}"
                f"{nearest(str(rest['machine']), MACHINES)}"
            )
        state = replace(self.state, **rest)
        if "text" in rest or "own_text" in rest:
            options = self._engine.options
            self._library(state).ids(self.model, state.text, options.preview_tokens)
        return state

    def resume(self) -> None:
        """Measure what is not known yet of the present setting."""
        with self._lock:
            request = self._request()
            known = self._engine.submit(request)
            complete = known is not None and known.complete
            done = self._engine.complete(request)
            self.phase = "done" if done else "twin" if complete else "first answer"
            self._show_first(known)

    def stop(self) -> None:
        """Stop measuring; what is shown stays, and `resume` (or any change) goes on."""
        with self._lock:
            if self.phase != "done":
                self.phase = "stopped"
            self._engine.worker.cancel()
            self._show(self.results)  # all of it: a running phase shows a state now and then

    def wait(self, timeout: float | None = None) -> bool:
        """Block until everything is measured; False if `timeout` seconds were not enough."""
        return self._engine.worker.wait(timeout)

    def close(self) -> None:
        """End the thread. The view stays as it is."""
        with self._lock:
            self._closed = True
            self.phase = "closed"
            self._show_status()
        self._engine.worker.close()

    def snapshot(self) -> Snapshot:
        """The view as it is now, as one piece of static HTML."""
        with self._lock:
            twin = self._engine.twin(self._request())
            return Snapshot(self.screen.static(self.results, self.points, self.state, twin))

    # Between buttons, engine and screen ----------------------------------------------------------

    def _library(self, state: State | None = None) -> Library:
        return Library(self._texts, (state or self.state).own_text)

    def _request(self) -> Request:
        state = self.state
        return Request(
            choice=state.choice,
            baseline=state.baseline,
            text=state.text,
            library=self._library(),
            twin=state.twin,
        )

    def _asked(self, name: str, value: Any) -> None:
        """A control was moved, on whatever thread the front end's message came in."""
        with self._lock:
            if name == "text" and value == OWN and not self.state.own_text.strip():
                self.controls.show_own(True)
                self.screen.message("type or paste a text below; it is read when you leave the box")
                return
            try:
                self.set(**{name: value})
            except KtlabError as error:
                self._complain(error, keep_text=name in ("text", "own_text"))

    def _use_own_text(self, _: object) -> None:
        self._asked("own_text", self.controls.all["own_text"].value)

    def _complain(self, error: Exception, *, keep_text: bool = False) -> None:
        self.message = str(error)
        self.controls.show(self.state, keep_text=keep_text)
        self.screen.message(self.message, error=True)

    def _publish(self, results: Results, phase: str) -> None:
        self.phase = phase
        if phase == "first answer":
            self._show_first(results)
        else:
            self._show(results)
        if phase == "done":
            self.controls.show(self.state, [r.choice for r in self.tried])

    def _failed(self, error: Exception) -> None:
        known = isinstance(error, KtlabError)
        self.phase = "failed"
        self.message = str(error) if known else f"{type(error).__name__}: {error}"
        self.screen.message(self.message, error=True)
        self._show(self.results)

    def _busy_changed(self, busy: bool) -> None:
        self._show_status()

    def _show(self, results: Results | None) -> None:
        twin = self._engine.twin(self._request())
        doing = self._engine.doing if self.phase == "twin" else ""
        self.screen.show(results, self.points, self.state, twin, doing)
        self._show_status()

    def _show_first(self, results: Results | None) -> None:
        """The numbers at once; the rest follows from the engine when the page has painted them."""
        self.screen.show_switches(self.state)
        self.screen.first(results)
        self._show_status()

    def _show_status(self) -> None:
        self.screen.status(
            self.phase, self.state, self.results, self._engine.doing, busy=self.phase not in IDLE
        )

    def __repr__(self) -> str:
        state, results = self.state, self.results
        head = f"ControlRoom({self.model.name}: {state.choice.label} against "
        quality = f"\n{results.quality}" if results and results.quality else ""
        return f"{head}{state.baseline.label}, on {state.text}; {self.phase}){quality}"

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        bundle = self.screen.widget._repr_mimebundle_(**options)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        return {**data, "text/plain": repr(self), "text/html": self.snapshot().html}


IDLE = ("done", "stopped", "failed", "closed")
