// Samples of two arms side by side. Every text of a model or a data set becomes a text node: none is ever markup.
(() => {
  "use strict";
  const PER_PAGE = 50;
  const CUT = 1, HIT_LIMIT = 2;
  const at = (id) => document.getElementById(id);
  const data = JSON.parse(at("data").textContent);
  const place = { task: at("task"), metric: at("metric"), a: at("arm-a"), b: at("arm-b"), order: at("order"), find: at("find") };
  const say = at("said");
  document.documentElement.classList.add("js");

  const make = (tag, className, ...children) => {
    const one = document.createElement(tag);
    if (className) one.className = className;
    one.append(...children);
    return one;
  };
  // What Python writes as `pieces`: a text, or texts and the code points of hidden characters in turn.
  const fill = (target, text) => {
    const parts = Array.isArray(text) ? text : [text];
    parts.forEach((part, index) => target.append(index % 2 ? make("span", "cp", part) : part));
    return target;
  };
  const number = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    const text = size > 0 && size < 0.0005 ? value.toExponential(1) : size >= 10000 ? value.toFixed(1) : value.toFixed(3);
    return text.replaceAll("-", "−");
  };
  const count = (value) => value.toLocaleString("en");

  // ---------------------------------------------------------------------------------------------------- side files
  const files = new Map();
  const waiting = new Map();
  window.harnessSide = (name, value) => waiting.get(name)?.(value);
  const side = (name) => {
    if (!files.has(name)) {
      files.set(name, new Promise((resolve, reject) => {
        const script = document.createElement("script");
        waiting.set(name, resolve);
        script.src = `${data.folder}/${name}.js`;
        script.onerror = () => {
          files.delete(name);
          reject(new Error(`${data.folder}/${name}.js is not beside this page. Move or publish the whole folder.`));
        };
        document.head.append(script);
      }));
    }
    return files.get(name);
  };
  const partOf = async (parts, index) => {
    const found = parts.findIndex(([, end]) => index < end);
    if (found < 0) return null;
    const start = found ? parts[found - 1][1] : 0;
    return (await side(parts[found][0]))[index - start];
  };
  const unlisted = new Map();
  const load = async (task) => {
    if (!unlisted.has(task)) {
      const [ids, scores] = await Promise.all([side(task.ids), side(task.values)]);
      unlisted.set(task, { ...ids, ...scores, where: new Map(ids.ids.map((id, index) => [id, index])) });
    }
    return unlisted.get(task);
  };

  // ------------------------------------------------------------------------------------------------------- choices
  const state = { task: "", metric: 0, a: 0, b: -1, show: "all", order: "stored", find: "", page: 0 };
  const tasksOf = (arm) => (arm < 0 ? [] : data.arms[arm].tasks);
  // A task of the same name that was asked alike goes before one that was not.
  const taskIn = (arm, like) => {
    const named = tasksOf(arm).filter((one) => one.name === like.name);
    return named.find((one) => one.asked === like.asked) ?? named.find((one) => one.task === like.task) ?? named[0];
  };
  const options = (select, values) => {
    select.replaceChildren(...values.map(([value, text]) => { const one = make("option", "", text); one.value = value; return one; }));
  };
  const read = () => {
    const given = new URLSearchParams(location.hash.slice(1));
    const whole = (name, fallback, low, high) => {
      const value = Number.parseInt(given.get(name) ?? "", 10);
      return value >= low && value <= high ? value : fallback;
    };
    state.a = whole("a", data.a, 0, data.arms.length - 1);
    state.b = whole("b", data.b, -1, data.arms.length - 1);
    const tasks = tasksOf(state.a).map((one) => one.task);
    state.task = tasks.includes(given.get("task")) ? given.get("task") : tasks[0] ?? "";
    state.metric = whole("metric", -1, 0, 99);
    state.show = given.get("show") ?? "all";
    state.order = given.get("order") ?? (state.b < 0 ? "stored" : "change");
    state.find = given.get("find") ?? "";
    state.page = whole("page", 1, 1, 1e6) - 1;
  };
  const keep = () => {
    const said = new URLSearchParams({ a: state.a, b: state.b, task: state.task, metric: state.metric, show: state.show, order: state.order, page: state.page + 1 });
    if (state.find) said.set("find", state.find);
    mine = `#${said}`;
    location.replace(mine);
  };
  let mine = "";

  // ------------------------------------------------------------------------------------------------------ the list
  const KINDS = [
    ["all", "All", () => true],
    ["changed", "Changed", (row) => row.change !== null && row.change !== 0],
    ["worse", "Worse", (row) => row.worse === true],
    ["better", "Better", (row) => row.worse === false],
    ["truncated", "Truncated", (row) => (row.flagsA | row.flagsB) !== 0],
    ["unscored", "Unscored", (row) => row.a === null || (row.ib !== null && row.b === null)],
  ];
  const ORDERS = [["stored", "as stored"], ["change", "largest change first"], ["low", "lowest score first"], ["high", "highest score first"]];
  const last = (value, other, sign) => (value === null) - (other === null) || (value === null ? 0 : sign * (value - other));
  const SORTS = {
    change: (x, y) => last(x.change === null ? null : Math.abs(x.change), y.change === null ? null : Math.abs(y.change), -1) || (y.worse === true) - (x.worse === true),
    low: (x, y) => last(x.b ?? x.a, y.b ?? y.a, 1),
    high: (x, y) => last(x.b ?? x.a, y.b ?? y.a, -1),
  };
  let now = { rows: [], taskA: null, taskB: null };

  const rowsOf = (listA, listB, metric, metricB) => {
    const direction = now.taskA.metrics[metric].better;
    const found = [];
    listA.ids.forEach((id, ia) => {
      const ib = listB ? listB.where.get(id) ?? null : null;
      if (listB && ib === null) return;
      const a = listA.values[metric][ia];
      const b = listB && metricB >= 0 ? listB.values[metricB][ib] : null;
      const change = a === null || b === null ? null : b - a;
      found.push({
        id, ia, ib, a, b, change, leaf: listA.leaves[listA.leaf[ia]],
        worse: change && direction ? change < 0 === direction > 0 : null,
        flagsA: listA.flags[ia], flagsB: listB ? listB.flags[ib] : 0,
        reasons: [...(listA.reasons[ia] ?? []), ...((listB && listB.reasons[ib]) ?? [])],
      });
    });
    return found;
  };

  const remark = (lines) => {
    at("remarks").replaceChildren(...lines.map((line) => make("li", "", line)));
    at("remarks").hidden = !lines.length;
  };

  const refresh = async () => {
    const turn = (refresh.turn = (refresh.turn ?? 0) + 1);
    const taskA = tasksOf(state.a).find((one) => one.task === state.task);
    if (!taskA) { say.textContent = "This arm has no sample."; return; }
    const taskB = state.b < 0 ? null : taskIn(state.b, taskA);
    if (state.metric < 0 || state.metric >= taskA.metrics.length) state.metric = Math.max(0, taskA.metrics.findIndex((one) => one.primary));
    const metricA = taskA.metrics[state.metric];
    const metricB = taskB ? taskB.metrics.findIndex((one) => one.name === metricA.name) : -1;
    const [listA, listB] = await Promise.all([load(taskA), taskB && load(taskB)]);
    if (turn !== refresh.turn) return;
    now = { taskA, taskB, listA, listB, rows: [] };
    now.rows = rowsOf(listA, listB, state.metric, metricB);
    const lines = [];
    if (state.b >= 0 && !taskB) lines.push("B was not asked this task.");
    if (taskB && metricB < 0) lines.push(`B has no ${metricA.name}.`);
    if (taskB && taskB.asked !== taskA.asked) lines.push(`A and B were asked differently (${taskA.task} and ${taskB.task}, another template or version): a change of score may be the prompt's.`);
    if (taskB && metricB >= 0 && taskB.metrics[metricB].scored !== metricA.scored) lines.push("A and B were scored differently: the scorers differ in options or model.");
    if (listB) {
      const [onlyA, onlyB] = [listA.ids.length - now.rows.length, listB.ids.length - now.rows.length];
      if (onlyA || onlyB) lines.push(`Left out: ${count(onlyA)} samples only in A, ${count(onlyB)} only in B.`);
    }
    remark(lines);
    controls(taskA);
    list();
  };

  const controls = (taskA) => {
    options(place.a, data.arms.map((arm, index) => [index, arm.name]));
    options(place.b, [[-1, "nothing"], ...data.arms.map((arm, index) => [index, arm.name])]);
    options(place.task, tasksOf(state.a).map((one) => [one.task, one.task]));
    options(place.metric, taskA.metrics.map((one, index) => [index, one.name]));
    options(place.order, ORDERS.filter(([name]) => state.b >= 0 || name !== "change"));
    for (const name of ["a", "b", "task", "metric", "order"]) place[name].value = String(state[name]);
    place.metric.closest("label").hidden = taskA.metrics.length < 2;
    if (document.activeElement !== place.find) place.find.value = state.find;
  };

  const list = () => {
    const sought = state.find.toLowerCase();
    const found = sought ? now.rows.filter((row) => `${row.id} ${row.leaf}`.toLowerCase().includes(sought)) : now.rows;
    const kinds = KINDS.filter(([name]) => state.b >= 0 || !["changed", "worse", "better"].includes(name));
    if (!kinds.some(([name]) => name === state.show)) state.show = "all";
    for (const button of at("kinds").querySelectorAll("button")) {
      const kind = kinds.find(([name]) => name === button.value);
      button.hidden = !kind;
      if (!kind) continue;
      button.setAttribute("aria-pressed", String(kind[0] === state.show));
      button.querySelector(".count").textContent = count(found.filter(kind[2]).length);
    }
    let shown = found.filter(kinds.find(([name]) => name === state.show)[2]);
    if (SORTS[state.order]) shown = [...shown].sort(SORTS[state.order]);
    const pages = Math.max(1, Math.ceil(shown.length / PER_PAGE));
    state.page = Math.min(state.page, pages - 1);
    const start = state.page * PER_PAGE;
    const part = shown.slice(start, start + PER_PAGE);
    at("samples").replaceChildren(...part.map(item));
    say.textContent = shown.length
      ? `${count(start + 1)} to ${count(start + part.length)} of ${count(shown.length)} samples${shown.length < now.rows.length ? `, ${count(now.rows.length)} in all` : ""}`
      : `No sample of ${count(now.rows.length)}.`;
    for (const [name, wanted] of [["before", state.page > 0], ["after", state.page < pages - 1]]) {
      for (const button of document.querySelectorAll(`button.${name}`)) button.disabled = !wanted;
    }
    if (at("reveal").checked) reveal();
    keep();
  };

  const item = (row) => {
    const score = make("span", "score", number(row.a));
    if (row.ib !== null) {
      const word = row.worse === true ? "worse" : row.worse === false ? "better" : row.change === null ? "unscored" : row.change ? "changed" : "same";
      score.append(" → ", number(row.b));
      score.classList.add(word);
      score.append(make("span", "word", ` ${word}`));
    } else if (row.a === null) score.textContent = "unscored";
    const summary = make("summary", "", score, make("span", "id", row.id));
    if (row.leaf) summary.append(make("span", "quiet leaf", row.leaf));
    const flags = row.flagsA | row.flagsB;
    if (flags & CUT) summary.append(make("span", "tag warn", "prompt cut"));
    if (flags & HIT_LIMIT) summary.append(make("span", "tag warn", "token budget spent"));
    const mark = make("span", "ask");
    mark.setAttribute("aria-hidden", "true");
    summary.append(mark);
    const one = make("details", "sample", summary);
    one.addEventListener("toggle", () => { if (one.open && one.children.length < 2) texts(one, row); });
    return one;
  };

  // ------------------------------------------------------------------------------------------------------ one sample
  const block = (title, text, className = "") => {
    const pre = fill(make("pre", `text ${className}`), text);
    pre.dir = "auto";
    pre.tabIndex = 0;
    pre.setAttribute("role", "group");
    pre.setAttribute("aria-label", title);
    return [make("h3", "", title), pre];
  };
  const answer = (name, found, score) => {
    const box = make("div", "side", make("h3", "who", make("span", "name", name), make("span", "quiet", ` ${number(score)}`)));
    if (!found || !Object.keys(found).length) box.append(make("p", "note", "The texts of this arm are not in its run's folder."));
    else {
      if (found.text !== undefined) box.append(block(`Answer of ${name}`, found.text, "answer")[1]);
      if (found.choices) {
        box.append(make("p", "note", "Continuations, log-likelihood in nats"));
        const choices = make("ol", "choices");
        for (const [text, logprob, best] of found.choices) {
          const line = make("li", best ? "best" : "", make("span", "num", number(logprob)), fill(make("span", "text"), text));
          line.querySelector(".text").dir = "auto";
          if (best) line.append(make("span", "tag", "most likely"));
          choices.append(line);
        }
        box.append(choices);
        if (found.more) box.append(make("p", "note", `and ${found.more} more`));
      }
      for (const text of found.errors ?? []) box.append(...block("Error", text));
      for (const text of found.detail ?? []) box.append(...block("What the scorer noted", text));
    }
    return box;
  };
  const texts = async (one, row) => {
    const box = make("div", "texts", make("p", "note", "Loading …"));
    one.append(box);
    const { taskA, taskB, listA, listB } = now;
    try {
      const same = !taskB || JSON.stringify(taskA.prompts) === JSON.stringify(taskB.prompts);
      const wanted = [partOf(taskA.prompts, row.ia), same ? null : partOf(taskB.prompts, row.ib), partOf(taskA.answers, row.ia), taskB ? partOf(taskB.answers, row.ib) : null];
      const [asked, askedB, answerA, answerB] = await Promise.all(wanted);
      box.replaceChildren();
      for (const [words, question] of [[same ? "Prompt" : "Prompt of A", asked], ["Prompt of B", askedB]]) {
        if (question) box.append(...block(words, question[0], "prompt"), ...(question[1] === null ? [] : block("Target", question[1])));
      }
      const sides = make("div", taskB ? "sides two" : "sides", answer(data.arms[state.a].name, answerA, row.a));
      if (taskB) sides.append(answer(data.arms[state.b].name, answerB, row.b));
      box.append(sides);
      const others = taskA.metrics.length > 1 ? taskA.metrics : [];
      if (others.length) {
        const line = make("p", "values");
        others.forEach((metric, index) => {
          const b = taskB ? taskB.metrics.findIndex((one) => one.name === metric.name) : -1;
          const value = number(listA.values[index][row.ia]) + (b < 0 ? "" : ` → ${number(listB.values[b][row.ib])}`);
          line.append(make("span", "", `${metric.name} `, make("b", "", value)));
        });
        box.append(line);
      }
      for (const reason of row.reasons) box.append(make("p", "note", reason));
    } catch (error) {
      box.replaceChildren(make("p", "note warn", error.message));
      one.addEventListener("toggle", () => { if (!one.open) box.remove(); }, { once: true });
    }
  };
  const reveal = () => {
    for (const one of document.querySelectorAll("details.sample")) one.open = at("reveal").checked;
  };

  // --------------------------------------------------------------------------------------------------------- events
  const failed = (error) => { say.textContent = error.message; say.classList.add("warn"); };
  const change = (name, value) => { state[name] = value; state.page = 0; };
  for (const name of ["a", "b", "metric"]) {
    place[name].addEventListener("change", () => {
      change(name, Number(place[name].value));
      if (name === "a") {
        const tasks = tasksOf(state.a);
        if (!tasks.some((one) => one.task === state.task)) state.task = (taskIn(state.a, now.taskA ?? {}) ?? tasks[0])?.task ?? "";
      }
      if (name === "b") state.order = state.b < 0 ? "stored" : "change";
      refresh().catch(failed);
    });
  }
  place.task.addEventListener("change", () => { change("task", place.task.value); state.metric = -1; refresh().catch(failed); });
  place.order.addEventListener("change", () => { change("order", place.order.value); list(); });
  place.find.addEventListener("input", () => { change("find", place.find.value); list(); });
  for (const [name, label] of KINDS) {
    const button = make("button", "", `${label} `, make("span", "count"));
    button.type = "button";
    button.value = name;
    button.addEventListener("click", () => { change("show", name); list(); });
    at("kinds").append(button);
  }
  at("swap").addEventListener("click", () => {
    if (state.b < 0) return;
    const like = now.taskB ?? now.taskA;
    [state.a, state.b] = [state.b, state.a];
    change("task", like.task);
    refresh().catch(failed);
  });
  for (const [name, step] of [["before", -1], ["after", 1]]) {
    for (const button of document.querySelectorAll(`button.${name}`)) {
      button.addEventListener("click", () => {
        state.page += step;
        list();
        at("browse").scrollIntoView();
      });
    }
  }
  at("reveal").checked = false;
  at("reveal").addEventListener("change", reveal);
  addEventListener("hashchange", () => { if (location.hash !== mine) { read(); refresh().catch(failed); } });
  read();
  refresh().catch(failed);
})();
