function duration(seconds) {
  const units = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const at = Math.max(0, units.findIndex(([, size]) => seconds >= 2 * size));
  if (seconds < 2) return `${show(seconds)} s`;
  return `${Math.round(seconds / units[at][1])} ${units[at][0]}`;
}

function addSamples(samples, page) { // what the run wrote, as it learnt
  if (!samples.length) return;
  const text = el("pre", { class: "panel" });
  const slider = el("input", { type: "range", min: 0, max: samples.length - 1, step: 1,
    "aria-label": "which sample" });
  const where = el("output");
  const tell = () => {
    const { step, sample } = samples[Number(slider.value)];
    where.textContent = `after step ${step.toLocaleString("en")}`;
    slider.setAttribute("aria-valuetext", where.textContent);
    text.textContent = sample;
  };
  slider.value = samples.length - 1;
  slider.addEventListener("input", tell);
  page.append(el("h2", { textContent: "What it wrote as it learnt" }),
    el("div", { class: "bar" }, slider, where), text);
  tell();
}

function addConfig(rows, page) {
  page.append(el("h2", { textContent: "Config" }),
    el("p", { class: "note", textContent: CHOSEN }));
  const chosenOnly = el("input", { type: "checkbox" });
  const search = el("input", { type: "search", placeholder: "find a field", "aria-label": "find a field" });
  const body = el("tbody");
  const fill = () => {
    const text = search.value.toLowerCase();
    const bold = (row, own = "") => `text mono${own}${row.chosen ? " chosen-value" : ""}`;
    body.replaceChildren(...rows
      .filter((row) => (!chosenOnly.checked || row.chosen) && (row.name + row.help).toLowerCase().includes(text))
      .map((row) => el("tr", {},
        el("td", { class: bold(row, " field"), textContent: row.name }),
        el("td", { class: bold(row), textContent: row.value }),
        el("td", { class: "text", textContent: row.help }))));
  };
  search.addEventListener("input", fill);
  chosenOnly.addEventListener("change", fill);
  page.append(el("div", { class: "bar" }, search, el("label", {}, chosenOnly, "only what was chosen")));
  page.append(el("div", { class: "scroll", tabIndex: 0 }, el("table", {}, el("thead", {}, el("tr", {},
    ...["field", "value", "meaning"].map((name) => el("th", { class: "text", textContent: name })))), body)));
  fill();
}

async function drawView(view, page) {
  const { last, best, last_step: step, num_steps: steps } = view.figures;
  const figures = el("div", { class: "figures" }, figure(`${step.toLocaleString("en")} / ${steps.toLocaleString("en")}`, "steps"));
  const known = [["train/loss", "training loss"], ["eval/loss", "held-out loss"],
    ["eval/bits_per_byte", "held-out bits per byte"], ["eval/gzip_bits_per_byte", "gzip -9, bits per byte"],
    ["eval/accuracy", "right answers, held out"], ["eval/reward", "reward, held out"],
    ["perf/elapsed_seconds", "since the start", duration], ["perf/tokens_per_sec", "tokens per second"],
    ["perf/mfu", "MFU, strict", percent], ["perf/memory_gb", "GB, most in use on a device"],
    ["perf/goodput", "of all time in steps (goodput)", percent],
    ["perf/data_wait_fraction", "of the steps' time waiting for data", percent]];
  for (const [name, title, spell] of known) {
    if (!(name in last)) continue;
    const lowest = name in best && best[name] !== last[name] ? `; lowest ${show(best[name], 4)}` : "";
    const value = spell && last[name] !== null ? spell(last[name]) : show(last[name], 4);
    figures.append(figure(value, title + lowest));
  }
  page.append(figures);
  await addCharts(view.data.charts, page);
  addSamples(view.data.samples, page);
  if (view.data.sample && !view.data.samples.length) { // else it is the last of them
    page.append(el("h2", { textContent: "What it wrote when training ended" }), el("pre", { textContent: view.data.sample }));
  }
  addConfig(view.data.config, page);
  if (view.data.log.length) {
    page.append(el("h2", { textContent: "The end of the log" }), el("pre", { textContent: view.data.log.join("\n") }));
  }
}
