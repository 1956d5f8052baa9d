/* A deployment: acts that ask once more, and the canary's interval while it grows. */
"use strict";

addEventListener("DOMContentLoaded", () => {
  const dialog = document.getElementById("act"), error = document.getElementById("act-error"), reason = document.getElementById("act-reason");
  const address = location.pathname.replace(/\/$/, "");
  const read = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  let wanted = null, plot = null, drawn = "", later = 0;

  // ---- acts ----

  function ask(button) {
    if (!button || dialog.open) return;
    const revision = Number(document.getElementById("stands").dataset.revision); // what the person sees; another one is refused
    wanted = { act: button.dataset.act, number: button.dataset.number, paused: button.dataset.paused === "true", revision };
    document.getElementById("act-title").textContent = button.textContent.replace(/^\s*[a-z]\s+/, "") + "?";
    document.getElementById("act-told").textContent = button.dataset.told;
    reason.value = error.textContent = "";
    dialog.showModal();
    reason.focus();
  }

  /* What is answered when its dialog has been left, or another one stands open, changes no dialog. */
  async function act() {
    const asked = wanted;
    const body = { reason: reason.value, expected: wanted.revision };
    if (wanted.act === "pause") body.paused = wanted.paused;
    if (wanted.number !== undefined) body.number = Number(wanted.number);
    const headers = { "HX-Request": "true", "Content-Type": "application/json" };
    const [method, where] = wanted.act === "pause" ? ["PATCH", address] : ["POST", `${address}/${wanted.act}`];
    try {
      const reply = await fetch(where, { method, headers, body: JSON.stringify(body) });
      if (reply.ok) {
        if (wanted === asked) dialog.close();
        document.body.dispatchEvent(new CustomEvent("live-deployments"));
        return;
      }
      const page = new DOMParser().parseFromString(await reply.text(), "text/html").querySelector("[role=alert]");
      if (wanted === asked) error.textContent = page?.textContent || `error ${reply.status}`;
    } catch {
      if (wanted === asked) error.textContent = "the server doesn't answer; press Enter to try again";
    }
  }

  document.getElementById("main").addEventListener("click", (event) => ask(event.target.closest("button[data-act]")));
  document.getElementById("act-form").addEventListener("submit", (event) => { event.preventDefault(); act(); });
  document.getElementById("act-leave").addEventListener("click", () => dialog.close());
  const KEYS = { p: "promote", b: "rollback", h: "pause" };
  let chord = 0; // a letter behind `g` opens a page (everlearn.js)
  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]") || event.ctrlKey || event.metaKey || event.altKey || everlearn.typing(event.target)) return;
    const chosen = KEYS[event.key] && Date.now() - chord > 1500 && document.querySelector(`#stands [data-act=${KEYS[event.key]}]`);
    chord = event.key === "g" ? Date.now() : 0;
    if (chosen) { event.preventDefault(); ask(chosen); }
  });

  // ---- the canary ----

  const percent = (value) => `${(100 * value).toFixed(1)} %`;

  function tell(course) {
    const grows = course.live ? "so far" : "at the end";
    document.getElementById("canary-told").textContent =
      `${course.candidate} minus ${course.champion}: between ${percent(course.low)} and ${percent(course.high)} ${grows}, ` +
      `after ${course.outcomes} outcomes, ${course.own} of them the candidate's. Promoted above ${percent(course.gain)}, stopped below ${percent(course.loss)}.`;
  }

  /* The interval is a staircase: it holds until an outcome moves it. */
  function stairs(course) {
    const xs = [0], low = [-1], high = [1];
    for (const [outcomes, below, above] of course.points) {
      xs.push(outcomes, outcomes);
      low.push(low[low.length - 1], below);
      high.push(high[high.length - 1], above);
    }
    xs.push(Math.max(course.outcomes, 1));
    low.push(low[low.length - 1]);
    high.push(high[high.length - 1]);
    return [xs, high, low];
  }

  function marks(course) {
    return (chart) => {
      const { ctx, bbox } = chart, ratio = devicePixelRatio;
      const line = (x1, y1, x2, y2, colour, dash) => {
        ctx.save();
        ctx.strokeStyle = colour;
        ctx.lineWidth = ratio;
        ctx.setLineDash(dash.map((length) => length * ratio));
        ctx.beginPath();
        ctx.moveTo(x1, y1);
        ctx.lineTo(x2, y2);
        ctx.stroke();
        ctx.restore();
      };
      for (const [bound, colour] of [[course.gain, read("--good")], [course.loss, read("--bad")]]) {
        const y = chart.valToPos(bound, "y", true);
        line(bbox.left, y, bbox.left + bbox.width, y, colour, [5, 4]);
      }
      ctx.save();
      ctx.font = `${11 * ratio}px system-ui, sans-serif`;
      ctx.textAlign = "left";
      for (const step of course.steps) {
        const x = chart.valToPos(step.outcomes, "x", true);
        line(x, bbox.top, x, bbox.top + bbox.height, read("--line"), [2, 3]);
        ctx.fillStyle = read("--dim");
        ctx.fillText(`${Math.round(100 * step.share)} %`, x + 3 * ratio, bbox.top + 12 * ratio);
      }
      ctx.restore();
    };
  }

  function draw(course) {
    const box = document.getElementById("canary-plot");
    plot?.destroy();
    const axis = { stroke: read("--dim"), grid: { stroke: read("--line"), width: 1 }, ticks: { stroke: read("--line"), width: 1 } };
    const series = (label) => ({ label, stroke: read("--accent"), width: 2, points: { show: false } });
    plot = new uPlot({
      width: box.clientWidth || 320, height: 260, legend: { show: false }, cursor: { show: false },
      scales: { x: { time: false }, y: { range: [-1, 1] } },
      axes: [{ ...axis, label: "outcomes", labelSize: 18, size: 36 }, { ...axis, size: 62, values: (_, ticks) => ticks.map((tick) => `${Math.round(100 * tick)} %`) }],
      series: [{}, series("high"), series("low")],
      bands: [{ series: [1, 2], fill: read("--tint") }],
      hooks: { draw: [marks(course)] },
    }, stairs(course), box);
  }

  async function grow(again, last = false) {
    const reply = await fetch(`${address}.json`, { headers: { "HX-Request": "true" } });
    if (!reply.ok) return;
    const { course } = await reply.json();
    document.getElementById("canary").hidden = !course;
    if (!course) return;
    // The server looks again only so often: what came since its last look is fetched when it does.
    if (course.live && course.fresh_in > 0 && !later && !last) {
      later = setTimeout(() => { later = 0; document.body.dispatchEvent(new CustomEvent("live-look")); }, 1000 * course.fresh_in + 50);
    }
    delete course.fresh_in;
    const text = JSON.stringify(course);
    if (text === drawn && !again) return;
    drawn = text;
    tell(course);
    draw(course);
  }

  for (const part of ["deployments", "feedback"]) document.body.addEventListener("live-" + part, () => grow(false));
  document.body.addEventListener("live-look", () => grow(false, true));
  document.addEventListener("theme", () => grow(true));
  let resized = 0;
  addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(() => grow(true), 150); });
  grow(false);
});
