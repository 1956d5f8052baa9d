/* Curves of a run: one small chart for each chosen metric, from the page's JSON twin, drawn again when the run has told more. */
"use strict";

const charts = { drawn: new Map(), busy: false, again: false };

charts.colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

charts.figure = (value) => (value == null ? "–" : String(Number(value.toPrecision(4))));

charts.options = (name, width) => ({
  width, height: 190, legend: { show: true }, cursor: { drag: { x: true, y: false } },
  scales: { x: { time: false } },
  series: [{ label: "step", value: (_, x) => charts.figure(x) }, { label: "value", value: (_, y) => charts.figure(y), stroke: charts.colour("accent"), width: 1.5, spanGaps: true, points: { size: 4 } }],
  axes: [0, 1].map((side) => ({
    stroke: charts.colour("dim"), grid: { stroke: charts.colour("line"), width: 1 }, ticks: { stroke: charts.colour("line") }, size: side ? 64 : 30,
    values: (_, splits) => splits.map(charts.figure),
    incrs: side ? undefined : [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000],
  })),
});

charts.show = (box, curves, name) => {
  const source = name in curves.client.series ? curves.client : curves.log;
  if (!(name in source.series)) return;
  const data = [source.x, source.series[name]];
  const there = charts.drawn.get(name);
  const last = charts.figure(data[1].findLast((value) => value != null));
  if (there) { there.chart.setData(data); there.last.textContent = last; return; }
  const figure = document.createElement("figure");
  figure.className = "card";
  figure.dataset.metric = name;
  const title = document.createElement("figcaption");
  const told = document.createElement("span");
  told.className = "dim";
  told.textContent = last;
  title.append(name + " ", told);
  figure.append(title);
  box.append(figure);
  figure.setAttribute("aria-label", name);
  const width = Math.max(200, figure.clientWidth - 24);
  charts.drawn.set(name, { chart: new uPlot(charts.options(name, width), data, figure), figure, last: told });
};

/* What a run tells of only later can be chosen as well. */
charts.offer = (names) => {
  const part = document.getElementById("names"), there = [...part.querySelectorAll("[name=show]")].map((box) => box.value);
  if (JSON.stringify(there) !== JSON.stringify(names)) htmx.trigger(part, "catch-up");
};

charts.fetch = async (box) => {
  if (charts.busy) { charts.again = true; return; }
  charts.busy = true;
  try {
    const reply = await fetch(box.dataset.source + location.search, { headers: { Accept: "application/json" } });
    if (!reply.ok) return;
    const found = await reply.json();
    for (const [name, { chart, figure }] of charts.drawn) {
      if (found.chosen.includes(name)) continue;
      chart.destroy();
      figure.remove();
      charts.drawn.delete(name);
    }
    for (const name of found.chosen) charts.show(box, found.curves, name);
    charts.offer(found.names);
    box.dataset.points = Math.max(found.curves.client.x.length, found.curves.log.x.length);
  } finally {
    setTimeout(() => {
      charts.busy = false;
      if (charts.again) { charts.again = false; charts.fetch(box); }
    }, 1000);
  }
};

/* Sizes and colours are baked into a chart, so it is made anew. */
charts.again_all = (box) => {
  for (const { chart, figure } of charts.drawn.values()) { chart.destroy(); figure.remove(); }
  charts.drawn.clear();
  charts.fetch(box);
};

document.addEventListener("DOMContentLoaded", () => {
  const box = document.getElementById("curves");
  if (!box) return;
  charts.fetch(box);
  for (const part of ["live-steps", "live-runs"]) document.body.addEventListener(part, () => charts.fetch(box));
  document.addEventListener("theme", () => charts.again_all(box));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.again_all(box));
  let resized = 0, width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(resized);
    resized = setTimeout(() => charts.again_all(box), 300);
  });
});
