/* Live parts that leave people in peace: one that says the same as before (but for ages) isn't put in again, what was opened stays open, and
   a part in which somebody writes waits until they have done. */
"use strict";

addEventListener("DOMContentLoaded", () => {
  const waiting = new Set(); // ids of parts that have changed meanwhile
  const open = new Set(); // ids of what is open in parts that are being put in

  const changed = (field) => field.value !== field.defaultValue || field.checked !== field.defaultChecked;
  const written = (part) => (part.contains(document.activeElement) && everlearn.typing(document.activeElement)) ||
    [...part.querySelectorAll("textarea, input")].some(changed);

  function words(part) {
    const copy = part.cloneNode(true);
    for (const time of copy.querySelectorAll("time")) time.textContent = "";
    for (const one of copy.querySelectorAll("details")) one.removeAttribute("open");
    return copy.innerHTML;
  }

  document.body.addEventListener("htmx:beforeSwap", (event) => {
    const { target, serverResponse } = event.detail;
    const made = target.id && new DOMParser().parseFromString(serverResponse, "text/html").getElementById(target.id);
    if (made && words(made) === words(target)) { event.detail.shouldSwap = false; return; }
    if (made && written(target)) {
      event.detail.shouldSwap = false;
      if (!waiting.has(target.id)) everlearn.notice("What you write in has changed meanwhile; that is shown when you have done.");
      waiting.add(target.id);
      return;
    }
    for (const one of target.querySelectorAll("details[open][id]")) open.add(one.id);
  });
  document.body.addEventListener("htmx:afterSettle", () => {
    for (const id of open) document.getElementById(id)?.setAttribute("open", "");
    open.clear();
  });

  function catchUp() {
    for (const id of waiting) {
      const part = document.getElementById(id);
      if (part && written(part)) continue;
      waiting.delete(id);
      if (part) htmx.trigger(part, "catch-up");
    }
  }

  // A moment later: the focus is then where it goes to, a form that is emptied is empty, and a click that took the focus is through.
  for (const name of ["focusout", "input", "reset"]) document.addEventListener(name, () => waiting.size && setTimeout(catchUp, 300));
});
