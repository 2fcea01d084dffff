// The page's side of live_figure.py: one Plotly for all figures, each drawn from its whole state.

const hub = (globalThis.ktlabPlotly ??= newHub());

function newHub() {
  let give;
  const source = new Promise((resolve) => { give = resolve; });
  let plotly;
  // Loaded when the first figure is drawn, so that it holds up no widget's start.
  return { give, plotly: () => (plotly ??= source.then(load)) };
}

async function load(source) {
  // Plotly's file fills module.exports where there is one.
  const parts = ["const module = {exports: {}};\n", source, "\nexport default module.exports;"];
  const url = URL.createObjectURL(new Blob(parts, { type: "text/javascript" }));
  try {
    return (await import(/* webpackIgnore: true */ url)).default;
  } finally {
    URL.revokeObjectURL(url);
  }
}

// Should Plotly's promise ever not settle, the chart must not stop for good: a drawing is waited for,
// but not for longer than this.
const PATIENCE_MS = 2000;
const later = (ms) => new Promise((resolve) => { setTimeout(resolve, ms); });

// Plotly holds the page for tens of milliseconds a figure: what the reader presses goes first.
const PRESSES_MS = 500;
const quiet = () => new Promise((resolve) => {
  if (globalThis.requestIdleCallback) requestIdleCallback(resolve, { timeout: PRESSES_MS });
  else setTimeout(resolve);
});

// The widget that keeps the figure; this one's own changes do not come through once it was late.
const stateOf = (model) => model.widget_manager.get_model(model.get("_shown").replace("IPY_MODEL_", ""));

// Draws the latest state; states that arrive while it draws are skipped but for the last.
function drawer(state, plot, Plotly) {
  let busy = false;
  let drawn;
  return async () => {
    if (busy) return;
    busy = true;
    try {
      while (drawn !== state.get("value")) {
        await quiet();
        drawn = state.get("value");
        const { figure: { data, layout }, rest: { config, classes } } = JSON.parse(drawn);
        plot.parentElement?.classList.add(...classes);
        // Resizing measures the element, so it must have the figure's height of its own.
        if (layout.height) plot.style.height = `${layout.height}px`;
        const drawing = Plotly.react(plot, data, layout, config);
        await Promise.race([drawing, later(PATIENCE_MS)]);
      }
    } finally {
      busy = false;
    }
  };
}

// What FigureWidget's `trace.on_click(callback)` waits for on the Python side.
function tellClick(model, { points }) {
  const each = (what) => points.map(what);
  model.set("_js2py_pointsCallback", {
    event_type: "plotly_click",
    points: {
      trace_indexes: each((point) => point.curveNumber),
      point_indexes: each((point) => point.pointNumber),
      xs: each((point) => point.x),
      ys: each((point) => point.y),
    },
  });
  model.save_changes();
}

export default {
  initialize({ model }) {
    const source = model.get("source");
    if (source) hub.give(source);
  },

  render({ model, el }) {
    const plot = document.createElement("div");
    el.append(plot);
    let stop = () => {};
    let gone = false;
    Promise.all([hub.plotly(), stateOf(model)]).then(([Plotly, state]) => {
      if (gone) return;
      const draw = drawer(state, plot, Plotly);
      const watch = new ResizeObserver(() => plot.data && plot.offsetParent && Plotly.Plots.resize(plot));
      state.on("change:value", draw);
      draw().then(() => {
        watch.observe(el);
        plot.on("plotly_click", (event) => tellClick(model, event));
      });
      stop = () => {
        watch.disconnect();
        state.off("change:value", draw);
        Plotly.purge(plot);
      };
    });
    return () => {
      gone = true;
      stop();
    };
  },
};
