"use strict";
(() => {
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const isDark = () => root.dataset.theme
    ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  theme.hidden = false;
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; });

  const key = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.order ?? cell.firstChild?.textContent.trim() ?? "";
    const number = Number(text.replace(/[,+%×]/g, "").replace("−", "-"));
    return text === "" ? null : Number.isNaN(number) ? text : number;
  };
  const compare = (a, b) => typeof a === "number" && typeof b === "number"
    ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const numeric = !head.classList.contains("l");
        const down = head.ariaSort ? head.ariaSort === "ascending" : numeric;
        for (const other of table.tHead.rows[0].cells) other.ariaSort = null;
        head.ariaSort = down ? "descending" : "ascending";
        const rows = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
        rows.sort(([a], [b]) => a === null || b === null
          ? (a === null) - (b === null) : down ? compare(b, a) : compare(a, b));
        table.tBodies[0].append(...rows.map(([, row]) => row));
      });
    });
  }

  const closed = [];
  addEventListener("beforeprint", () => {
    for (const each of document.querySelectorAll("details:not([open])")) { closed.push(each); each.open = true; }
  });
  addEventListener("afterprint", () => { for (const each of closed.splice(0)) each.open = false; });
})();
