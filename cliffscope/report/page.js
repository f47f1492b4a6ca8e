"use strict";
// Figures are drawn one after another, so that the page can be read and scrolled while they appear.
const config = {displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"]};
const waiting = [...document.querySelectorAll("script[data-plot]")];

function draw(script) {
  const spec = JSON.parse(script.textContent);
  return Plotly.newPlot(document.getElementById(script.dataset.plot), spec.data, spec.layout, config);
}

function drawNext() {
  const script = waiting.shift();
  if (script === undefined) {
    document.documentElement.dataset.drawn = "yes";
    return;
  }
  draw(script).then(() => setTimeout(drawNext, 0));
}

// A figure in a closed transcript has no width; it takes its own when the transcript opens.
for (const details of document.querySelectorAll("details.transcript")) {
  details.addEventListener("toggle", () => {
    if (!details.open) return;
    for (const plot of details.querySelectorAll(".js-plotly-plot")) Plotly.Plots.resize(plot);
  });
}

for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  table.querySelectorAll("th button").forEach((button, column) => {
    button.addEventListener("click", () => {
      const head = button.parentElement;
      const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      const numeric = head.classList.contains("number");
      const key = (row) => row.cells[column].dataset.sort;
      const order = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (numeric ? Number(x) - Number(y) || x.localeCompare(y) : x.localeCompare(y));
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}

for (const input of document.querySelectorAll(".filter input")) {
  const rows = [...input.closest(".table").querySelectorAll("tbody tr")];
  input.addEventListener("input", () => {
    const wanted = input.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
}

for (const control of document.querySelectorAll("input[data-layers]")) {
  const details = document.getElementById(control.dataset.layers);
  const scores = JSON.parse(details.querySelector("script[data-scores]").textContent).map(atob);
  const tokens = [...details.querySelectorAll(".tokens i")];
  const start = control.value;
  control.addEventListener("input", () => {
    const layer = scores[Number(control.value)];
    tokens.forEach((token, place) => token.style.setProperty("--s", layer.charCodeAt(place) % 255));
    details.querySelector("output").textContent = control.value + (control.value === start ? " (probe layer)" : "");
  });
}

// Paper is narrower than most screens, and closed transcripts would print as one line.
addEventListener("beforeprint", () => {
  for (const plot of document.querySelectorAll(".js-plotly-plot")) {
    Plotly.relayout(plot, {width: Math.min(plot.clientWidth, 660)});
  }
});
addEventListener("afterprint", () => {
  for (const plot of document.querySelectorAll(".js-plotly-plot")) Plotly.relayout(plot, {width: null, autosize: true});
});

// Plotly and CircuitsVis stand after this script.
addEventListener("DOMContentLoaded", () => {
  for (const script of document.querySelectorAll("script[data-circuits]")) {
    try {
      CircuitsVis.render(script.dataset.circuits, CircuitsVis[script.dataset.component], JSON.parse(script.textContent));
    } catch (error) {
      // The figures below must not go with it.
      console.error(error);
    }
  }
  drawNext();
});
