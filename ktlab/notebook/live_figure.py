"""`LiveFigure`: a Plotly FigureWidget that draws its whole state, and cannot come up empty.

Plotly's own widget opens empty and is then sent its data and every later change, once each.
anywidget drops such messages for good when a widget's JavaScript is not ready two seconds after it
was opened, and each FigureWidget brings 5 MB of it: several figures, or a busy machine, leave empty
axes. Here one copy of Plotly serves a page and is loaded after the widgets are up; the figure is
one synchronised value, complete when the widget opens, and the page draws the latest one it has.
That value is kept by a plain widget: a page that is busy for two seconds loses none of its changes.

For code that uses it, it is a FigureWidget: `batch_update`, `add_trace`, `figure.data[0].y = ...`.
What the reader does in the page (zoom, legend) stays in the page.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as widgets
import plotly.graph_objects as go
import traitlets
from plotly.offline import get_plotlyjs

_JS = Path(__file__).with_name("live_figure.js")


class _Library(anywidget.AnyWidget):
    """Hands the source of Plotly to the page, once for all its figures."""

    _esm = _JS
    source = traitlets.Unicode().tag(sync=True)


@cache
def _library() -> _Library:
    return _Library(source=get_plotlyjs())


class _State(widgets.Widget):
    """A figure as JSON. Jupyter's own kind of widget, whose messages anywidget cannot drop."""

    value = traitlets.Unicode().tag(sync=True)


class LiveFigure(go.FigureWidget):
    """A figure on the page that follows this object: change it, and the page shows it."""

    _esm = _JS
    _shown = traitlets.Instance(_State).tag(sync=True, **widgets.widget_serialization)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        _library()
        self._is_complete = False
        self._shown = _State()
        super().__init__(*arguments, **options)
        self._is_complete = True
        self.observe(self._show, ("_config", "_dom_classes"))
        self._show()
        self.open()

    def open(self) -> None:
        """Tell the page about this widget; not before it has something to show."""
        if self._is_complete:
            super().open()

    def _show(self, *_arguments: Any, **_options: Any) -> None:
        rest = {"config": self._config, "classes": self._dom_classes}
        self._shown.value = f'{{"figure": {self.to_json()}, "rest": {json.dumps(rest)}}}'

    # Plotly calls one of these after each change, to send what changed; we send what is.
    _send_addTraces_msg = _show
    _send_animate_msg = _show
    _send_moveTraces_msg = _show
    _send_relayout_msg = _show
    _send_restyle_msg = _show
    _send_update_msg = _show

    def _send_deleteTraces_msg(self, delete_inds: list[int]) -> None:
        raise NotImplementedError("a live figure keeps its traces: set visible=False instead")
