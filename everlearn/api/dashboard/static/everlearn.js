/* The frame of the dashboard: theme, keys, signing in and out, and parts that are fetched again when they have changed. */
"use strict";

const everlearn = {
  /* Whether a key is a letter in a field. A dialog that was just closed keeps the focus until the next frame: nobody types there. */
  typing: (element) => element instanceof HTMLElement && element.checkVisibility() &&
    (element.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(element.tagName)),

  /* Says something for a few seconds. */
  notice(text) {
    const box = document.getElementById("notice");
    box.textContent = text;
    box.hidden = false;
    clearTimeout(everlearn.timer);
    everlearn.timer = setTimeout(() => { box.hidden = true; }, 6000);
  },

  /* What changes something; foreign pages can't send this header. */
  send: (method, address, headers = {}) => fetch(address, { method, headers: { "HX-Request": "true", Accept: "application/json", ...headers } }),

  theme(next) {
    if (next) {
      try { localStorage.setItem("everlearn-theme", next); } catch { /* kept for this page only */ }
    }
    let kept = next;
    try { kept = kept || localStorage.getItem("everlearn-theme"); } catch { /* none is kept */ }
    if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
    document.dispatchEvent(new Event("theme"));
  },

  dark: () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark",
};

everlearn.theme();

/* Ages go on while nothing changes; as everlearn/api/dashboard/frame.py writes them. */
everlearn.ages = () => {
  for (const item of document.querySelectorAll("time[datetime]")) {
    const past = Math.max(0, (Date.now() - Date.parse(item.dateTime)) / 1000);
    const [unit, size] = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]].find(([, size]) => past >= size) || ["s", 1];
    item.textContent = `${(past / size).toFixed(0)} ${unit} ago`;
  }
};

/* One stream says by a digest for each part what has changed; elements with hx-trigger="live-PART from:body" then fetch themselves. */
everlearn.listen = () => {
  const seen = JSON.parse(document.body.dataset.seen || "{}");
  if (!Object.keys(seen).length) return;
  const stream = new EventSource("/dashboard/events");
  stream.onmessage = (event) => {
    for (const [part, digest] of Object.entries(JSON.parse(event.data))) {
      if (seen[part] === digest) continue;
      seen[part] = digest;
      document.body.dispatchEvent(new CustomEvent("live-" + part));
    }
  };
  addEventListener("pagehide", () => stream.close());
};

everlearn.keys = () => {
  let waiting = 0;
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || everlearn.typing(event.target)) return;
    const dialog = document.getElementById("keys");
    if (dialog.open) return;
    if (Date.now() - waiting < 1500) {
      waiting = 0;
      const place = [...document.querySelectorAll("nav [data-key]")].find((item) => item.dataset.key === event.key);
      if (place) { event.preventDefault(); place.click(); }
    } else if (event.key === "g") {
      waiting = Date.now();
    } else if (event.key === "?") {
      event.preventDefault();
      dialog.showModal();
    } else if (event.key === "t") {
      everlearn.theme(everlearn.dark() ? "light" : "dark");
    }
  });
};

everlearn.signIn = (form) => form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const field = document.getElementById("key"), told = document.getElementById("sign-in-error");
  told.textContent = "";
  const bad = /[^\x21-\x7e]/.test(field.value.trim());
  const reply = bad ? null : await everlearn.send("POST", "/dashboard/session", { Authorization: "Bearer " + field.value.trim() });
  if (reply?.status === 204) { location.reload(); return; }
  told.textContent = bad ? "A key has letters, digits, '-' and '_' only." : JSON.parse(await reply.text()).error.message;
  field.select();
});

document.addEventListener("DOMContentLoaded", () => {
  document.getElementById("theme").addEventListener("click", () => everlearn.theme(everlearn.dark() ? "light" : "dark"));
  document.getElementById("help").addEventListener("click", () => document.getElementById("keys").showModal());
  document.getElementById("sign-out")?.addEventListener("click", async () => {
    await everlearn.send("DELETE", "/dashboard/session");
    location.assign("/dashboard");
  });
  const form = document.getElementById("sign-in");
  if (form) everlearn.signIn(form);
  everlearn.keys();
  everlearn.listen();
  setInterval(everlearn.ages, 5000);
  document.body.addEventListener("htmx:responseError", (event) => {
    const page = new DOMParser().parseFromString(event.detail.xhr.responseText, "text/html");
    everlearn.notice(page.querySelector("[role=alert]")?.textContent || "error " + event.detail.xhr.status);
  });
  document.body.addEventListener("htmx:sendError", () => everlearn.notice("the server doesn't answer"));
});
