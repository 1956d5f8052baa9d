/* Review by keyboard. What is chosen stands on the card until Ctrl-Enter sends it; each thing that is sent has a key of its own, so that a
   lost answer is asked for again and never said twice. */
"use strict";

addEventListener("DOMContentLoaded", () => {
  const queue = document.getElementById("queue"), told = document.getElementById("chosen");
  const choices = JSON.parse(queue.dataset.choices);
  const cards = [...queue.querySelectorAll("article")];
  const drafts = new Map(); // card -> {choice, keys}
  const ACTS = "everlearn-review-acts"; // what was sent in this tab, for undo: lists of feedback ids, the newest last
  let at = 0, busy = false;

  const area = (card) => card.querySelector("textarea");
  const original = (card) => card.querySelector(".said")?.textContent;
  const corrected = (card) => !!area(card) && area(card).value !== original(card);
  const sent = (card) => card.classList.contains("sent");
  const many = () => cards.filter((card) => card.getAttribute("aria-selected") === "true" && !sent(card));
  const draft = (card) => { if (!drafts.has(card)) drafts.set(card, { keys: {} }); return drafts.get(card); };
  const fresh = () => "review-" + [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  const acts = () => { try { return JSON.parse(sessionStorage.getItem(ACTS) || "[]"); } catch { return []; } };
  const keep = (list) => { try { sessionStorage.setItem(ACTS, JSON.stringify(list.slice(-50))); } catch { /* undo ends with the page */ } };

  function show(card, text = "") {
    const choice = draft(card).choice;
    const parts = [choice ? choices[choice - 1].label : "", corrected(card) ? "corrected" : ""].filter(Boolean);
    card.querySelector(".state").textContent = text || parts.join(", ");
    card.classList.toggle("drafted", parts.length > 0 && !sent(card));
    const num = many().length;
    told.textContent = num ? `${num} chosen` : "";
  }

  function go(to) {
    if (!cards.length) return;
    cards[at].tabIndex = -1;
    at = Math.max(0, Math.min(cards.length - 1, to));
    cards[at].tabIndex = 0;
    cards[at].focus();
    cards[at].scrollIntoView({ block: "nearest" });
  }

  function on() {
    const after = cards.findIndex((card, place) => place > at && !sent(card));
    const any = after >= 0 ? after : cards.findIndex((card) => !sent(card));
    if (any >= 0) return go(any);
    go(at);
    (document.getElementById("next") || document.querySelector(".pager a"))?.focus();
  }

  function choose(number) {
    if (number > choices.length) return;
    const wanted = many().length ? many() : [cards[at]].filter((card) => card && !sent(card));
    for (const card of wanted) {
      const own = draft(card);
      own.choice = wanted.length === 1 && own.choice === number ? undefined : number;
      delete own.keys.rating;
      show(card);
    }
  }

  function mark(card, on) {
    if (sent(card)) return;
    card.setAttribute("aria-selected", String(on));
    card.querySelector("input").checked = on;
    show(card);
  }

  function edit(card) {
    if (!card || sent(card)) return;
    if (!area(card)) { everlearn.notice("The content of this answer isn't kept: it can be rated and not corrected."); return; }
    card.querySelector(".correcting").hidden = false;
    area(card).focus();
    area(card).select();
  }

  async function ask(method, address, body) {
    const headers = { "HX-Request": "true", "Content-Type": "application/json" };
    let reply;
    try {
      reply = await fetch(address, { method, headers, body: body && JSON.stringify(body) });
    } catch {
      throw new Error("the server doesn't answer; Ctrl-Enter sends it again, and it counts once");
    }
    if (reply.status === 204) return null;
    const text = await reply.text();
    if (reply.ok) return JSON.parse(text);
    const page = new DOMParser().parseFromString(text, "text/html").querySelector("[role=alert]");
    throw new Error(page?.textContent || `error ${reply.status}`);
  }

  async function say(card, what, body) {
    const keys = draft(card).keys;
    keys[what] ||= fresh();
    const about = { record_id: card.dataset.record, choice: Number(card.dataset.choice), name: queue.dataset.name };
    const by = { source: "human", source_id: queue.dataset.source, idempotency_key: keys[what] };
    return (await ask("POST", "/dashboard/review/feedback", { ...about, ...by, ...body })).id;
  }

  async function send() {
    if (busy || !cards.length) return;
    const wanted = (many().length ? many() : [cards[at]]).filter((card) => !sent(card) && (draft(card).choice || corrected(card)));
    if (!wanted.length) { everlearn.notice(`Nothing is chosen: 1 to ${choices.length} rate the answer, e corrects it.`); return; }
    busy = true;
    const ids = [];
    try {
      for (const card of wanted) {
        show(card, "sending");
        const { choice } = draft(card);
        card.said = card.said || [];
        if (choice) card.said.push(await say(card, "rating", { kind: "float", value: choices[choice - 1].value }));
        if (corrected(card)) card.said.push(await say(card, "correction", { kind: "demonstration", text: area(card).value }));
        ids.push(...card.said);
        card.classList.add("sent");
        card.setAttribute("aria-selected", "false");
        card.querySelector("input").checked = false;
        if (area(card)) card.querySelector(".correcting").hidden = true;
        show(card);
        card.querySelector(".state").textContent += " · sent";
      }
    } catch (error) {
      everlearn.notice(error.message);
      for (const card of wanted.filter((one) => !sent(one))) { card.said = []; show(card); }
    } finally {
      busy = false;
    }
    if (ids.length) { keep([...acts(), ids]); on(); }
  }

  async function undo() {
    const list = acts(), ids = list.pop();
    if (busy) return;
    if (!ids) { everlearn.notice("Nothing was sent that could be undone."); return; }
    busy = true;
    try {
      for (const id of ids) await ask("DELETE", `/dashboard/review/feedback/${encodeURIComponent(id)}`);
      keep(list);
      const back = cards.filter((card) => card.said?.some((id) => ids.includes(id)));
      if (!back.length) { location.reload(); return; }
      for (const card of back) {
        card.classList.remove("sent");
        card.said = [];
        draft(card).keys = {};
        show(card);
      }
      go(cards.indexOf(back[0]));
      everlearn.notice(`Undone: ${ids.length === 1 ? "one word is" : ids.length + " words are"} forgotten.`);
    } catch (error) {
      everlearn.notice(error.message);
    } finally {
      busy = false;
    }
  }

  function leave() {
    const card = cards[at];
    if (everlearn.typing(document.activeElement)) { card?.focus(); show(card); return; }
    if (many().length) { for (const one of many()) mark(one, false); return; }
    if (card && !sent(card)) {
      drafts.delete(card);
      if (area(card)) { area(card).value = original(card); card.querySelector(".correcting").hidden = true; }
      show(card);
    }
  }

  const KEYS = {
    ArrowDown: () => go(at + 1), j: () => go(at + 1),
    ArrowUp: () => go(at - 1), k: () => go(at - 1),
    e: () => edit(cards[at]),
    x: () => cards[at] && mark(cards[at], cards[at].getAttribute("aria-selected") !== "true"),
    a: () => { const all = many().length < cards.filter((card) => !sent(card)).length; for (const card of cards) mark(card, all); },
    u: undo,
    n: () => document.getElementById("next")?.click(),
  };

  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    if (event.key === "Escape") { event.preventDefault(); leave(); return; }
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); send(); return; }
    if (event.ctrlKey || event.metaKey || event.altKey || everlearn.typing(event.target)) return;
    if (event.key === "Enter" && event.target === cards[at]) { cards[at].querySelector(".open")?.click(); return; }
    if (/^[1-9]$/.test(event.key)) { event.preventDefault(); choose(Number(event.key)); return; }
    if (KEYS[event.key] && Date.now() - chord > 1500) { event.preventDefault(); KEYS[event.key](); }
    chord = event.key === "g" ? Date.now() : 0;
  });
  let chord = 0; // a letter behind `g` opens a page (everlearn.js)

  cards.forEach((card, place) => {
    card.addEventListener("focusin", () => { if (at !== place) { cards[at].tabIndex = -1; at = place; card.tabIndex = 0; } });
    card.querySelector("input").addEventListener("change", (event) => mark(card, event.target.checked));
    area(card)?.addEventListener("input", () => { delete draft(card).keys.correction; show(card); });
  });
  document.getElementById("bar").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.choose) choose(Number(button.dataset.choose));
    else ({ edit: () => edit(cards[at]), send, undo })[button.dataset.act]();
  });
  if (cards.length) go(0);
});
