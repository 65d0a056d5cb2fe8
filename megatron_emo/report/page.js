"use strict";
const byText = new Intl.Collator("en", { numeric: true }).compare;

function compareCells(one, other) {
  if (one.dataset.sort !== undefined && other.dataset.sort !== undefined) {
    return Number(one.dataset.sort) - Number(other.dataset.sort);
  }
  return byText(one.textContent, other.textContent);
}

function sortBy(table, head, column) {
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const body = table.tBodies[0];
  const isEmpty = (row) => row.cells[column].textContent === "–";
  const rows = [...body.rows].sort((a, b) =>
    isEmpty(a) - isEmpty(b)
    || (down ? -1 : 1) * compareCells(a.cells[column], b.cells[column]));
  body.append(...rows);
}

function addSorting(table) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sortBy(table, head, column));
    head.append(button);
  });
}

function addFilter(table) {
  const rows = [...table.tBodies[0].rows];
  if (rows.length < 6) return;
  const label = document.createElement("label");
  const input = document.createElement("input");
  const count = document.createElement("output");
  input.type = "search";
  const box = document.createElement("div");
  box.className = "filter";
  label.append("Rows with ", input);
  box.append(label, count);
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    count.value = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  });
  table.parentElement.before(box);
}

const tables = [...document.querySelectorAll("table[data-grid]")];
for (const table of tables) {
  addSorting(table);
  addFilter(table);
}
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
document.documentElement.dataset.ready = tables.length;
