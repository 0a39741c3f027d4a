(() => {
  "use strict";
  const root = document.documentElement;
  root.classList.add("js");

  const valueOf = (row, column) => {
    const cell = row.cells[column];
    const given = cell.getAttribute("data-v");
    if (given === null) return cell.textContent.trim();
    return given === "" ? null : Number(given);
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });

  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const original = Array.from(body.rows);
    const heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach((head, column) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const numeric = head.classList.contains("num");
        const steps = numeric ? ["descending", "ascending", null] : ["ascending", "descending", null];
        const next = steps[(steps.indexOf(head.getAttribute("aria-sort")) + 1) % steps.length];
        for (const other of heads) other.removeAttribute("aria-sort");
        let rows = original;
        if (next) {
          head.setAttribute("aria-sort", next);
          const sign = next === "ascending" ? 1 : -1;
          // A row without a value comes last in either direction.
          rows = original
            .map((row, index) => ({ row, index, value: valueOf(row, column) }))
            .sort((a, b) => {
              if (a.value === null || b.value === null) return (a.value === null) - (b.value === null) || a.index - b.index;
              return sign * compare(a.value, b.value) || a.index - b.index;
            })
            .map((entry) => entry.row);
        }
        body.append(...rows);
      });
    });
  }

  const reveal = document.getElementById("reveal");
  if (reveal) {
    reveal.checked = false;
    reveal.addEventListener("change", () => {
      for (const group of document.querySelectorAll("details.samples")) if (reveal.checked) group.open = true;
      for (const sample of document.querySelectorAll("details.sample")) sample.open = reveal.checked;
    });
  }
})();
