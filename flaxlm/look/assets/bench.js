async function drawView(view, page) {
  await addCharts(view.data.charts, page);
  const row = (tag, texts) => el("tr", {},
    ...texts.map((text) => el(tag, { class: "text", textContent: text })));
  page.append(el("h2", { textContent: "Figures" }));
  page.append(el("div", { class: "scroll", tabIndex: 0 }, el("table", {},
    el("thead", {}, row("th", view.data.columns)),
    el("tbody", {}, ...view.data.rows.map((texts) => row("td", texts))))));
}
