"use strict";
// Charts: the arms whose legend entries are pressed are brought out.
for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
    const chosen = new Set([...document.querySelectorAll('.legend [aria-pressed="true"]')].map((b) => b.dataset.arm));
    for (const charts of document.querySelectorAll(".charts")) {
      charts.classList.toggle("chosen", chosen.size > 0);
      for (const part of charts.querySelectorAll("[data-arm]")) part.classList.toggle("kept", chosen.has(part.dataset.arm));
    }
  });
}

// Tokens: ids on hover and focus, arrow keys, boundaries that the shown tokenizers don't share.
const tip = document.getElementById("tip");

function showTip(token) {
  const bytes = token.dataset.b;
  tip.textContent = `id ${token.dataset.i}: “${token.textContent}”, ${bytes} byte${bytes === "1" ? "" : "s"}`;
  tip.hidden = false;
  const box = token.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left), document.documentElement.clientWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${above >= 4 ? above : box.bottom + 6}px`;
  token.setAttribute("aria-describedby", "tip");
}

function hideTip() {
  tip.hidden = true;
}

// The token in the line above or below whose middle is nearest.
function vertical(tokens, token, direction) {
  const box = token.getBoundingClientRect();
  const middle = box.left + box.width / 2;
  let best = null;
  let bestDistance = Infinity;
  let line = null;
  const start = tokens.indexOf(token);
  for (let i = start + direction; i >= 0 && i < tokens.length; i += direction) {
    const other = tokens[i].getBoundingClientRect();
    if (Math.abs(other.top - box.top) < box.height / 2) continue;
    line ??= other.top;
    if (Math.abs(other.top - line) > box.height / 2) break;
    const distance = Math.abs(other.left + other.width / 2 - middle);
    if (distance < bestDistance) [best, bestDistance] = [tokens[i], distance];
  }
  return best;
}

function move(event) {
  const tokens = [...event.currentTarget.children];
  const token = event.target.closest("b");
  if (!token) return;
  const at = tokens.indexOf(token);
  const next = {
    ArrowRight: () => tokens[at + 1],
    ArrowLeft: () => tokens[at - 1],
    ArrowDown: () => vertical(tokens, token, 1),
    ArrowUp: () => vertical(tokens, token, -1),
    Home: () => tokens[0],
    End: () => tokens[tokens.length - 1],
  }[event.key];
  if (event.key === "Escape") hideTip();
  if (!next || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  next()?.focus();
}

// One token of a row can be reached with Tab: that which had the focus last.
function enter(event) {
  const token = event.target.closest("b");
  if (!token) return;
  for (const other of event.currentTarget.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
  token.tabIndex = 0;
  showTip(token);
}

function prepare(tokens) {
  if (tokens.getAttribute("role")) return;
  tokens.setAttribute("role", "listbox");
  tokens.setAttribute("aria-orientation", "horizontal");
  [...tokens.children].forEach((token, i) => {
    token.setAttribute("role", "option");
    token.tabIndex = i === 0 ? 0 : -1;
  });
  tokens.addEventListener("keydown", move);
  tokens.addEventListener("focusin", enter);
  tokens.addEventListener("focusout", hideTip);
  tokens.addEventListener("pointerover", (event) => {
    const token = event.target.closest("b");
    if (token) showTip(token);
  });
  tokens.addEventListener("pointerout", hideTip);
}

// Where tokens begin, in bytes from the beginning of the text.
function begins(row) {
  let offset = 0;
  return [...row.querySelectorAll("b")].map((token) => {
    const begin = offset;
    offset += Number(token.dataset.b);
    return begin;
  });
}

function choose() {
  const chosen = new Set([...document.querySelectorAll("[data-choice]:checked")].map((box) => box.dataset.choice));
  for (const paragraph of document.querySelectorAll(".paragraph")) {
    const shown = [];
    for (const row of paragraph.querySelectorAll(".row")) {
      row.hidden = !chosen.has(row.dataset.row);
      if (!row.hidden) shown.push([row, begins(row)]);
    }
    const sets = shown.filter(([, offsets]) => offsets.length > 0).map(([, offsets]) => new Set(offsets));
    for (const [row, offsets] of shown) {
      const tokens = row.querySelector(".tokens");
      prepare(tokens);
      [...tokens.children].forEach((token, i) => {
        token.classList.toggle("mark", !sets.every((set) => set.has(offsets[i])));
      });
    }
  }
}

for (const box of document.querySelectorAll("[data-choice]")) box.addEventListener("change", choose);
window.addEventListener("scroll", () => {
  const token = document.activeElement?.closest(".tokens b"); // a focus that scrolled the page keeps its tip
  if (token) showTip(token);
  else if (tip) hideTip();
}, { passive: true });
if (tip) choose();
