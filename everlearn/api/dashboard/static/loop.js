/* Live parts that leave the reader in peace: one that says the same as before (but for ages) isn't put in again, and what was opened stays
   open. */
"use strict";

addEventListener("DOMContentLoaded", () => {
  let open = [];

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
    open = [...target.querySelectorAll("details[open][id]")].map((one) => one.id);
  });
  document.body.addEventListener("htmx:afterSettle", () => {
    for (const id of open) document.getElementById(id)?.setAttribute("open", "");
    open = [];
  });
});
