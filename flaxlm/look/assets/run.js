async function drawView(view, page) {
  const { last, best, last_step: step, num_steps: steps } = view.figures;
  const figures = el("div", { class: "figures" }, figure(`${step.toLocaleString("en")} / ${steps.toLocaleString("en")}`, "steps"));
  const known = [["train/loss", "training loss, nats per token"], ["eval/loss", "held-out loss"],
    ["eval/bits_per_byte", "held-out bits per byte"], ["eval/gzip_bits_per_byte", "gzip -9, bits per byte"],
    ["eval/accuracy", "masks filled rightly"], ["perf/tokens_per_sec", "tokens per second"],
    ["perf/mfu", "MFU, strict"], ["perf/memory_gb", "GB, most in use on a device"], ["perf/goodput", "of all time in steps"]];
  for (const [name, title] of known) {
    if (!(name in last)) continue;
    const lowest = name in best && best[name] !== last[name] ? `; lowest ${show(best[name])}` : "";
    figures.append(figure(show(last[name], 4), title + lowest));
  }
  page.append(figures);
  await addCharts(view.data.charts, page);

  if (view.data.sample) {
    page.append(el("h2", { textContent: "What it wrote when training ended" }), el("pre", { textContent: view.data.sample }));
  }
  page.append(el("h2", { textContent: "Config" }));
  const changedOnly = el("input", { type: "checkbox" });
  const search = el("input", { type: "search", placeholder: "find a field", "aria-label": "find a field" });
  const body = el("tbody");
  const fill = () => {
    const text = search.value.toLowerCase();
    body.replaceChildren(...view.data.config
      .filter((row) => (!changedOnly.checked || row.changed) && (row.name + row.help).toLowerCase().includes(text))
      .map((row) => el("tr", { class: row.changed ? "changed" : "" },
        el("td", { class: "text mono", textContent: row.name }),
        el("td", { class: "text mono", textContent: row.value }),
        el("td", { class: "text", textContent: row.help }))));
  };
  search.addEventListener("input", fill);
  changedOnly.addEventListener("change", fill);
  page.append(el("div", { class: "bar" }, search, el("label", {}, changedOnly, "only what is not a default")));
  page.append(el("div", { class: "scroll", tabIndex: 0 }, el("table", {}, el("thead", {}, el("tr", {},
    ...["field", "value", "meaning"].map((name) => el("th", { class: "text", textContent: name })))), body)));
  fill();
  if (view.data.log.length) {
    page.append(el("h2", { textContent: "The end of the log" }), el("pre", { textContent: view.data.log.join("\n") }));
  }
}
