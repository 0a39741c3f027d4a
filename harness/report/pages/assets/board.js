// The board: sorts, filters, unfolds seeds. Numbers and places come from Python as they are shown; texts become text nodes.
(() => {
  "use strict";
  const SHOWN = 50;
  const at = (id) => document.getElementById(id);
  const data = JSON.parse(at("data").textContent);
  const table = at("board");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const heads = Array.from(table.tHead.rows[0].cells);
  const facets = Array.from(document.querySelectorAll("select.facet"));
  const state = { column: -1, direction: null, all: false, unfolded: new Set() };
  document.documentElement.classList.add("js");

  const make = (tag, className, text) => {
    const one = document.createElement(tag);
    if (className) one.className = className;
    if (text !== undefined) one.textContent = text;
    return one;
  };
  const draw = (tag, attributes) => {
    const one = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) one.setAttribute(name, value);
    return one;
  };
  const cellOf = (cell) => {
    const td = make("td", cell ? "" : "none", cell ? undefined : "–");
    if (!cell) return td;
    const [mean, ends, counts, marks] = cell;
    td.append(make("b", "", mean));
    if (ends) td.append(" ", make("span", "ends", ends));
    if (marks.length) {
      const bar = draw("svg", { class: "bar", viewBox: "0 0 150 12", "aria-hidden": "true" });
      if (marks.length > 1) bar.append(draw("path", { class: "ci", d: `M${marks[1]} 6H${marks[2]}` }));
      bar.append(draw("circle", { cx: marks[0], cy: 6, r: 3.2 }));
      td.append(bar);
    }
    if (counts) td.append(make("span", "counts", counts));
    return td;
  };
  const seedRows = new Map();
  const seedsOf = (index) => {
    if (!seedRows.has(index)) {
      seedRows.set(index, data.seeds[index].map(([name, cells]) => {
        const row = make("tr", "seed");
        const head = make("th", "", undefined);
        head.scope = "row";
        head.append(make("span", "arm", name));
        row.append(head, ...cells.map(cellOf), ...Array.from({ length: data.more }, () => make("td")));
        return row;
      }));
    }
    return seedRows.get(index);
  };

  const matching = () => {
    const words = at("find").value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = facets.map((select) => [Number(select.dataset.facet), select.value]).filter(([, value]) => value);
    return rows.map((_, index) => index).filter((index) =>
      words.every((word) => data.texts[index].includes(word)) &&
      wanted.every(([facet, value]) => data.factors[index][facet] === value));
  };
  const byName = new Intl.Collator("en", { numeric: true });
  const sorted = (found) => {
    if (!state.direction) return found;
    const sign = state.direction === "ascending" ? 1 : -1;
    if (state.column === 0) return found.sort((x, y) => sign * byName.compare(data.texts[x], data.texts[y]) || x - y);
    const value = (index) => data.means[index][state.column - 1];
    // A row without a value comes last in either direction.
    return found.sort((x, y) => {
      const [a, b] = [value(x), value(y)];
      return (a === null) - (b === null) || (a === null ? 0 : sign * (a - b)) || x - y;
    });
  };
  const show = () => {
    const found = sorted(matching());
    const shown = state.all ? found : found.slice(0, SHOWN);
    const list = document.createDocumentFragment();
    for (const index of shown) {
      list.append(rows[index]);
      const button = rows[index].querySelector("button.fold");
      if (!button) continue;
      const open = state.unfolded.has(index);
      button.setAttribute("aria-expanded", String(open));
      if (open) list.append(...seedsOf(index));
    }
    body.replaceChildren(list);
    at("said").textContent = found.length === rows.length && shown.length === rows.length
      ? `${rows.length.toLocaleString("en")} arms`
      : `${shown.length.toLocaleString("en")} shown of ${found.length.toLocaleString("en")} that match, ${rows.length.toLocaleString("en")} in all`;
    at("all").hidden = shown.length === found.length;
  };

  heads.forEach((head, column) => {
    head.querySelector("button.sort").addEventListener("click", () => {
      const falls = column > 0 && data.better[column - 1] > 0;
      const steps = falls ? ["descending", "ascending", null] : ["ascending", "descending", null];
      const before = head.getAttribute("aria-sort");
      for (const other of heads) other.removeAttribute("aria-sort");
      state.column = column;
      state.direction = steps[(steps.indexOf(before) + 1) % steps.length];
      if (state.direction) head.setAttribute("aria-sort", state.direction);
      show();
    });
  });
  body.addEventListener("click", (event) => {
    const button = event.target.closest("button.fold");
    if (!button) return;
    const index = rows.indexOf(button.closest("tr"));
    if (!state.unfolded.delete(index)) state.unfolded.add(index);
    show();
    button.focus();
  });
  at("unfold").hidden = !data.seeds.some((seeds) => seeds.length);
  at("unfold").addEventListener("click", () => {
    const open = at("unfold").getAttribute("aria-pressed") !== "true";
    at("unfold").setAttribute("aria-pressed", String(open));
    state.unfolded = new Set(open ? rows.keys() : []);
    show();
  });
  at("find").value = "";
  at("find").addEventListener("input", show);
  for (const select of facets) { select.value = ""; select.addEventListener("change", show); }
  at("all").addEventListener("click", () => { state.all = true; show(); });
  // What is printed is the whole board.
  addEventListener("beforeprint", () => { state.before = state.all; state.all = true; show(); });
  addEventListener("afterprint", () => { state.all = state.before; show(); });
  show();
})();
