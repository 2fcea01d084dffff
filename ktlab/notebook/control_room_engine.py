"""The control room without widgets: requests in, results out, the latest request wins.

One worker thread measures on clones of the model, phase after phase: a first answer from a few
tokens, time by stage and routing, streamed quality, generated text, speed. Everything measured is
kept, so that a setting chosen again is there at once, and a cancelled one goes on where it can.
"""

import sys
import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

from ktlab.errors import KtlabError
from ktlab.measurement.pace import pace
from ktlab.measurement.quality import Quality, stream_quality
from ktlab.measurement.speed import stream_speed
from ktlab.measurement.tokens import BaselineCache, Prediction
from ktlab.measurement.twin import Side, Twin, stream_twin
from ktlab.model.components import every_product
from ktlab.model.interrupt import Interrupted, interruptible
from ktlab.model.model import Model
from ktlab.notebook import control_room_phases as phases
from ktlab.notebook.control_room_choice import OWN, Choice, Library
from ktlab.notebook.control_room_kernels import OFF, twin_sides
from ktlab.notebook.control_room_phases import Glance, Options
from ktlab.notebook.control_room_results import Progress, Results
from ktlab.notebook.worker import Worker

SWITCH_S = 0.0005
"""How long a thread may keep Python's lock while a request runs. Usually it is 5 ms; then the
kernel's answers to the page, of many short steps, wait for the worker at each of them."""
BREATH_S = 0.1
"""Between the first number and the rest, so that the page paints the number first: on two cores it
gets to it late where a measurement keeps both."""
EVERY_S = 0.2
"""Between two states of one phase on the page, which draws them on the same cores and answers no
press meanwhile. Text is written, and a known baseline read against, faster than one can look."""

Update = tuple[Results, str]
"""What is known now, and the phase that is going on ("done" at the end)."""
Fields = dict[str, Any]
Found = tuple[Fields, str]
Texts = dict[str, list[int]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What to measure: `choice` against `baseline` on a text of `library`."""

    choice: Choice
    baseline: Choice
    text: str
    library: Library
    twin: str = OFF
    """The real model whose widths the twin has; "off" measures none."""

    @property
    def text_key(self) -> Hashable:
        return (self.text, self.library.own if self.text == OWN else "")

    @property
    def key(self) -> tuple[Choice, Choice, Hashable]:
        return (self.choice, self.baseline, self.text_key)


class Engine:
    """Measures requests on its own thread; `publish(results, phase)` is called there, locked."""

    def __init__(
        self,
        model: Model,
        *,
        publish: Callable[[Results, str], None],
        on_error: Callable[[Exception], None] | None = None,
        on_busy: Callable[[bool], None] | None = None,
        options: Options | None = None,
    ) -> None:
        self.model = model.clone()
        """Settings that the room does not know (masks, other formats) stay as they were."""
        for product in every_product(self.model):
            _ = product.kernel  # chosen now: each request's clone would choose all of them anew
        self.options = options or Options()
        self.worker = Worker(on_error=on_error, on_busy=on_busy, name="ktlab-control-room")
        self._publish = publish
        self._results: dict[tuple[Choice, Choice, Hashable], Results] = {}
        self._glances: dict[Hashable, Glance] = {}
        self._written: dict[Hashable, tuple[int, ...]] = {}
        self._predicted: dict[Hashable, Prediction] = {}
        self._twins: dict[tuple[str, Side, Side], Twin | str] = {}
        self._baseline = BaselineCache()
        self._shown = ("", 0.0)
        """The phase that was published last, and when."""
        self.doing = ""
        """What the twin is at."""

    # Asked from outside ----------------------------------------------------------------------

    def submit(self, request: Request) -> Results | None:
        """Start measuring, instead of whatever runs; returns what is known already."""
        known = self.known(request)
        self.worker.submit(lambda cancel: self._run(request, cancel))
        return known

    def known(self, request: Request) -> Results | None:
        """What has been measured for a request, complete or not."""
        with self.worker.lock:
            return self._results.get(request.key)

    def tried(self, request: Request) -> tuple[Results, ...]:
        """All settings measured against the same baseline on the same text, oldest first."""
        with self.worker.lock:
            return tuple(
                found
                for (_, baseline, text_key), found in self._results.items()
                if (baseline, text_key) == (request.baseline, request.text_key)
            )

    def twin(self, request: Request) -> Twin | str | None:
        """The true-size twin of a request, complete or not; why there is none, or None."""
        if request.twin == OFF:
            return None
        with self.worker.lock:
            return self._twins.get(self._twin_key(request))

    def complete(self, request: Request) -> bool:
        """Whether there is nothing left to measure."""
        known = self.known(request)
        return known is not None and known.complete and not self._twin_due(request)

    def _twin_key(self, request: Request) -> tuple[str, Side, Side]:
        return (request.twin, *twin_sides(self.model, request.baseline, request.choice))

    def _twin_due(self, request: Request) -> bool:
        found = self.twin(request)
        return request.twin != OFF and (
            found is None or (isinstance(found, Twin) and not found.done)
        )

    # On the worker's thread --------------------------------------------------------------------

    def _run(self, request: Request, cancel: threading.Event) -> None:
        model = interruptible(self.model, cancel)
        usual = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        self._shown = ("", 0.0)
        try:
            for results, phase in self._phases(model, request, cancel):
                keep = partial(self._keep, request, results, phase)
                if not self.worker.publish(cancel, keep):
                    return
        except Interrupted:
            return
        finally:
            sys.setswitchinterval(usual)

    def _keep(self, request: Request, results: Results, phase: str) -> None:
        self._results[request.key] = results
        shown, shown_s = self._shown
        if phase != shown or perf_counter() - shown_s >= EVERY_S:
            self._publish(results, phase)
            self._shown = (phase, perf_counter())

    def _phases(self, model: Model, request: Request, cancel: threading.Event) -> Iterator[Update]:
        results = self.known(request) or Results(
            choice=request.choice, baseline=request.baseline, text=request.text
        )
        start, before = perf_counter(), results.seconds
        for found, phase in self._measure(model, request, results, cancel):
            if found:
                results = replace(results, **found, seconds=before + perf_counter() - start)
            yield results, phase
        if self._twin_due(request):
            for _ in self._twin(request, results, cancel):
                yield results, "twin"
        yield results, "done"

    def _measure(
        self, model: Model, request: Request, known: Results, cancel: threading.Event
    ) -> Iterator[Found]:
        """What is not known yet, as fields of `Results` with the phase they come from."""
        if known.quality is None:
            yield self._first_answer(model, request), "first answer"
        cancel.wait(BREATH_S)
        if known.complete:
            return
        yield {}, "pictures"
        options = self._sized(model)
        yield {"limits": options.smaller_than(self.options)}, "pictures"
        texts = request.library.ids(model, request.text, options.max_tokens)
        timed = known.stages is not None
        for found in self._quality(model, request, known, texts):
            yield found, "quality"
            if not timed and found["quality"].windows > 1:  # after a number that can be believed
                yield self._stages(model, request, texts), "stages"
                timed = True
        if not timed:
            yield self._stages(model, request, texts), "stages"
        if known.generations is None or not known.generations.done:
            for found in self._text(model, request, texts):
                yield found, "text"
        if known.speed is None or not known.speed.done:
            for found in self._speed(model, request, known, texts):
                yield found, "speed"

    def _sized(self, model: Model) -> Options:
        """The options with sizes that this model's pace has time for; timed at the first call."""
        return self.options.within(pace(model))

    def _first_answer(self, model: Model, request: Request) -> Fields:
        start = perf_counter()
        texts = request.library.ids(model, request.text, self.options.preview_tokens)
        before, after = (
            self._glance(model, request, choice, texts)
            for choice in (request.baseline, request.choice)
        )
        labels = (request.baseline.label, request.choice.label)
        quality, histogram = phases.first_answer(
            model, before, after, labels, perf_counter() - start
        )
        return {"quality": quality, "histogram": histogram, "preliminary": True}

    def _stages(self, model: Model, request: Request, texts: Texts) -> Fields:
        times, histogram = phases.stages(
            model, request.baseline, request.choice, texts, self._sized(model)
        )
        return {"stages": times, "histogram": histogram}

    def _glance(self, model: Model, request: Request, choice: Choice, texts: Any) -> Glance:
        key = (choice, request.text_key)
        if key not in self._glances:
            while len(self._glances) > 64:
                self._glances.pop(next(iter(self._glances)))
            self._glances[key] = phases.glance(model, choice, texts)
        return self._glances[key]

    def _quality(
        self, model: Model, request: Request, known: Results, texts: Texts
    ) -> Iterator[Fields]:
        before = 0 if known.preliminary or not known.quality else known.quality.tokens
        if before and known.quality and known.quality.done:
            return
        history = known.history
        a, b = request.baseline.overrides(), request.choice.overrides()
        for quality in stream_quality(
            model, texts, a=a, b=b, window=self.options.window, baseline=self._baseline
        ):
            quality = replace(quality, label_a=request.baseline.label, label_b=request.choice.label)
            if quality.tokens <= before:  # cancelled and resumed: never show less than before
                continue
            history = (*history, _progress(quality))
            yield {"quality": quality, "preliminary": False, "history": history}

    def _twin(
        self, request: Request, results: Results, cancel: threading.Event
    ) -> Iterator[Twin | str]:
        key = self._twin_key(request)

        def tell(text: str) -> None:
            self.doing = text
            self._publish(results, "twin")

        def say(text: str) -> None:
            self.worker.publish(cancel, partial(tell, text))

        try:
            for found in stream_twin(
                *key,
                rounds=self.options.twin_rounds,
                prefill_tokens=self.options.twin_tokens,
                cancel=cancel,
                progress=say,
            ):
                self._twins[key] = found
                yield found
        except KtlabError as error:  # too large, or a format that cannot be made: said in its panel
            self._twins[key] = str(error)
            yield str(error)

    def _text(self, model: Model, request: Request, texts: Texts) -> Iterator[Fields]:
        options = self._sized(model)
        prompt = next(iter(texts.values()))[: options.prompt_tokens]
        a, b, where = request.baseline, request.choice, request.text_key
        for choice in (a, b):
            if (choice, where) in self._written:
                continue
            for ids in phases.written(model, choice, prompt, options.new_tokens):
                if choice is b and (a, where) in self._written:
                    both = self._both(model, request, prompt)
                    generations = phases.marked(
                        model, prompt, self._written[a, where], both, ids, done=False
                    )
                    yield {"generations": generations}
            self._written[choice, where] = ids
        generations = phases.marked(
            model,
            prompt,
            self._written[a, where],
            self._both(model, request, prompt),
            self._written[b, where],
            done=True,
        )
        yield {"generations": generations}

    def _both(
        self, model: Model, request: Request, prompt: list[int]
    ) -> tuple[Prediction, Prediction]:
        """What both settings predict along the baseline's continuation."""
        ids = self._written[request.baseline, request.text_key]
        found = []
        for choice in (request.baseline, request.choice):
            key = (choice, request.baseline, request.text_key)
            if key not in self._predicted:
                while len(self._predicted) > 64:
                    self._predicted.pop(next(iter(self._predicted)))
                self._predicted[key] = phases.continuation(model, choice, prompt, ids)
            found.append(self._predicted[key])
        return found[0], found[1]

    def _speed(
        self, model: Model, request: Request, known: Results, texts: Texts
    ) -> Iterator[Fields]:
        before = known.speed.repeats if known.speed else 0
        settings = {"baseline": request.baseline.overrides()}
        if request.choice != request.baseline:
            settings["now"] = request.choice.overrides()
        ids = next(iter(texts.values()))
        options, context = self._sized(model), model.config.context_length
        run = stream_speed(
            model,
            settings,
            prompt_tokens=min(options.speed_prompt, context * 3 // 4),
            decode_tokens=min(options.speed_decode, context // 4),
            repeats=options.repeats,
            text=ids,
        )
        for speed in run:
            if speed.repeats > before:
                yield {"speed": speed}


def _progress(quality: Quality) -> Progress:
    kl = quality.kl_mean
    return Progress(tokens=quality.tokens, value=kl.value, low=kl.low, high=kl.high)
