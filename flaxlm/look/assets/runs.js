// Several runs: each has a colour in all charts and tables.
function runsTable(first, rows, runs, cells) {
  const head = el("tr", {}, el("th", { class: "text", textContent: first }), ...runs.map((name, number) => {
    const swatch = el("span", { class: "swatch" });
    drawn(() => { swatch.style.background = colourOf(number); });
    return el("th", { class: "text" }, el("span", { class: "named" }, swatch, name));
  }));
  return el("div", { class: "scroll whole", tabIndex: 0 }, el("table", {}, el("thead", {}, head),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...cells(row))))));
}

function numberOf(value) {
  return value >= 1000 ? Math.round(value).toLocaleString("en") : show(value, 4);
}

async function drawView(view, page) {
  const { runs, charts, across, rows, config } = view.data;
  const shared = sharedState(across);
  const redraw = () => redraws.forEach((draw) => draw());
  const legend = el("div", { class: "legend bar", role: "group", "aria-label": "runs" },
    ...runs.map((name, number) => legendButton(name, number, shared.hidden, redraw)));
  const keys = Object.keys(across);
  const names = { x: "steps", tokens: "tokens", time: "time" };
  page.append(legend, choice("over", keys.map((key) => names[key]), 0, (number) => {
    shared.across = keys[number];
    redraw();
  }));
  await addCharts(charts, page, shared);

  page.append(el("h2", { textContent: "What came out" }),
    runsTable("", rows, runs, (row) => [el("td", { class: "text", textContent: row.name }),
      ...row.values.map((value, number) => el("td", {
        class: `text${row.best.includes(number) ? " chosen-value" : ""}`, textContent: numberOf(value) }))]),
    el("p", { class: "note", textContent: "In bold: the best of the runs, where one is better." }));
  page.append(el("h2", { textContent: "What differs in the configs" }));
  if (!config.length) {
    page.append(el("p", { textContent: "Nothing." }));
    return;
  }
  page.append(runsTable("field", config, runs, (row) => [
    el("td", { class: "text" }, el("span", { class: "mono field", textContent: row.name }),
      el("div", { class: "note", textContent: row.help })),
    ...row.values.map((value, number) => el("td", {
      class: `text mono${row.chosen[number] ? " chosen-value" : ""}`, textContent: value }))]),
  el("p", { class: "note", textContent: CHOSEN }));
}
