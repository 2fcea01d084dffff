"""What the live views of notebooks 02 to 05 share: a text to work on, a status line, a worker.

An instrument works on `model.clone()`, so the reader's model is never touched. Its callbacks only
submit jobs; jobs run on the instrument's own thread and set widget traits. Displayed where there is
no widget front end, it shows its static HTML.
"""

import threading
from collections.abc import Callable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from ktlab import html
from ktlab.errors import ContextError
from ktlab.notebook.css import style
from ktlab.notebook.excerpts import excerpt
from ktlab.notebook.live_figure import LiveFigure
from ktlab.notebook.worker import Job, Worker

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from ktlab.model.model import Model

OWN = "your own text"


def numbers(values: Mapping[str, object], *, preliminary: bool = False) -> str:
    """A row of labelled numbers as HTML; preliminary ones are dimmed."""
    tone = "v pre" if preliminary else "v"
    cells = "".join(
        f'<div><div class="k">{escape(str(name))}</div>'
        f'<div class="{tone}">{escape(str(value))}</div></div>'
        for name, value in values.items()
    )
    return f'<div class="kt-numbers">{cells}</div>'


def live(figure: "Figure") -> LiveFigure:
    """`figure` as a widget that follows the width of its column and has no tool bar."""
    widget = LiveFigure(figure)
    widget.update_layout(autosize=True, margin_t=40)  # room for a title that comes later
    widget._config = {"displayModeBar": False}
    widget.add_class("kt-figure")
    return widget


class Snapshot:
    """A picture of an instrument that needs no kernel: HTML, then figures."""

    def __init__(self, html: str, *figures: "Figure", plain: str = "snapshot") -> None:
        self.html = html
        self.figures = figures
        self.plain = plain

    def __repr__(self) -> str:
        return self.plain

    def _repr_html_(self) -> str:
        return self.html

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display({"text/html": self.html, "text/plain": self.plain}, raw=True)
        for figure in self.figures:
            display(figure)


def whole(frame: "pd.DataFrame") -> Snapshot:
    """A table of pandas with nothing cut: pandas itself cuts text at 50 characters."""
    rows = [(name, *row) for name, row in zip(frame.index, frame.to_numpy(), strict=True)]
    table = html.table(rows, (frame.index.name or "", *frame.columns))
    return Snapshot(html.card("", table), plain=frame.to_string())


class TextSource:
    """A drop-down of texts and a box to edit: editing makes it the reader's own text.

    `on_change()` is called once for each change, when the box is left or a text is picked.
    """

    def __init__(
        self, texts: Mapping[str, str], on_change: Callable[[], None], *, characters: int = 1200
    ) -> None:
        self._samples = {name: excerpt(text, characters) for name, text in texts.items()}
        self._on_change = on_change
        self._filling = False
        names = [*self._samples, OWN]
        first = "english" if "english" in names else names[0]
        self.choice = widgets.Dropdown(options=names, description="text", value=first)
        self.choice.layout.width = "230px"
        self.area = widgets.Textarea(
            value=self._samples.get(first, ""),
            continuous_update=False,
            placeholder="type or paste a text, then click outside this box",
        )
        self.area.layout = widgets.Layout(width="99%", height="96px")
        self.choice.observe(self._picked, "value")
        self.area.observe(self._edited, "value")

    @property
    def text(self) -> str:
        """What to work on; `ContextError` if it is empty."""
        if not self.area.value.strip():
            raise ContextError("the text is empty; type at least one word, or pick a text above")
        return str(self.area.value)

    @property
    def name(self) -> str:
        """The domain, or "your own text"."""
        return str(self.choice.value)

    def set(self, text: str) -> None:
        """Put the reader's own text in, as if typed."""
        self.area.value = text

    def _picked(self, change: Mapping[str, Any]) -> None:
        if self._filling:
            return
        if change["new"] in self._samples:
            self._filling = True
            try:
                self.area.value = self._samples[change["new"]]
            finally:
                self._filling = False
            self._on_change()

    def _edited(self, change: Mapping[str, Any]) -> None:
        if self._filling:
            return
        self._filling = True
        try:
            self.choice.value = OWN
        finally:
            self._filling = False
        self._on_change()


class Instrument:
    """Base of a live view: subclasses fill `body` and implement `snapshot`."""

    title = "instrument"

    def __init__(self, model: "Model") -> None:
        self.model = model.clone()
        self.note = ""
        self.error = ""
        self._doing = "computing"
        self.status = widgets.HTML()
        self.status.add_class("kt-status")
        head = widgets.HTML(
            style("instrument") + style("token_view") + f'<div class="kt-title">{self.title}</div>'
        )
        self.body = widgets.VBox()
        self.body.add_class("kt-body")
        self.box = widgets.VBox([head, self.status, self.body])
        self.box.add_class("kt-view")
        self.worker = Worker(on_error=self._on_error, on_busy=self._on_busy)

    # Working ---------------------------------------------------------------------------------

    def submit(self, job: Job, doing: str = "computing") -> None:
        """Run `job(cancel)` instead of what runs now, showing what it is `doing`."""
        with self.worker.lock:
            self._doing = doing
            self.error = ""
        self.worker.submit(job)

    def publish(self, cancel: threading.Event, write: Callable[[], None]) -> bool:
        """From a job: change what is shown, unless the job was replaced (then False)."""
        return self.worker.publish(cancel, write)

    def wait(self, timeout: float | None = 60) -> "Instrument":
        """Block until the instrument has answered; for scripts and for `snapshot`.

        After `timeout` seconds the note says that it has not.
        """
        if not self.worker.wait(timeout):
            with self.worker.lock:
                self.note = f"still {self._doing}: this is what is known after {timeout:.0f} s"
        return self

    def close(self) -> None:
        """End the thread and take the widgets away."""
        self.worker.close()
        self.box.close()

    def _on_error(self, error: Exception) -> None:
        # A job that failed leaves what was shown before it.
        known = isinstance(error, ValueError | TypeError)
        self.error = str(error) if known else f"{type(error).__name__}: {error}"

    def _on_busy(self, busy: bool) -> None:
        # Beside an error stand the numbers of what was asked before: grey.
        (self.box.add_class if self.error else self.box.remove_class)("kt-failed")
        if self.error:
            self.status.value = f'<span class="kt-error">{escape(self.error)}</span>'
        elif busy:
            self.status.value = f'<span class="kt-busy">{escape(self._doing)} …</span>'
        else:
            self.status.value = f'<span class="kt-note">{escape(self.note)}</span>'

    # Showing ---------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """What the instrument shows, as a picture that needs no kernel; waits for the answer."""
        raise NotImplementedError

    def to_html(self) -> str:
        """Static HTML of what is known at this moment."""
        return f"{style('instrument')}<div class=kt-view><b>{self.title}</b></div>"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model.name}: {self.note or self._doing})"

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = dict(self.box._repr_mimebundle_(**options) or {})
        return {**bundle, "text/plain": repr(self), "text/html": self.to_html()}
