// Curves (SVG) and heat maps (canvas).

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function ticks(low, high, log) {
  if (log) {
    const found = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
      for (const m of high / low < 200 ? [1, 2, 5] : [1]) found.push(m * 10 ** e);
    }
    return found.filter((x) => x >= low * 0.999 && x <= high * 1.001);
  }
  const rough = (high - low) / 5 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(k * step);
  return found;
}

function shortNumber(x) {
  const size = Math.abs(x);
  if (size >= 1e9) return `${show(x / 1e9)}G`;
  if (size >= 1e6) return `${show(x / 1e6)}M`;
  if (size >= 1e4) return `${show(x / 1e3)}k`;
  if (size && size < 1e-3) return x.toExponential(0);
  return String(Number(x.toPrecision(4)));
}

const CHOSEN = "In bold: what the config file or the command chose. The rest are defaults, "
  + "and what follows from other fields.";

// What charts of the same runs share: which are hidden, and what lies across.
function sharedState(labels) {
  return { hidden: new Set(), across: Object.keys(labels)[0], labels };
}

function lineChart(chart, shared = null) {
  const section = el("section", { class: "chart" }, el("h2", { textContent: chart.title }));
  if (chart.says) section.append(el("p", { class: "says", textContent: chart.says }));
  const positive = (key) => chart.series.some((s) => s[key].some((v) => v > 0));
  const state = { log_x: chart.log_x, log_y: chart.log_y, hidden: shared ? shared.hidden : new Set(), at: null };
  const acrossOf = (series) => (shared ? series[shared.across] : series.x);
  const colourAt = (number) => chart.series[number].colour ?? number;
  const holder = el("div");
  const readout = el("p", { class: "note", "aria-live": "off" });
  const toggles = el("div", { class: "bar" });
  for (const [key, name, axis] of [["log_x", "log across", "x"], ["log_y", "log upwards", "y"]]) {
    if (!positive(axis)) continue;
    const box = el("input", { type: "checkbox", checked: state[key],
      onchange: () => { state[key] = box.checked; draw(); } });
    toggles.append(el("label", { class: "note" }, box, name));
  }
  const legend = el("div", { class: "legend" });
  if (!shared && chart.series.length > 1) {
    chart.series.forEach((series, number) => legend.append(legendButton(series.name, number, state.hidden, () => draw())));
  }
  section.append(toggles, legend, holder, readout);

  function draw() {
    const W = Math.max(300, holder.clientWidth || 900);
    const H = Math.round(Math.max(220, Math.min(340, W * 0.4)));
    const box = { left: 58, right: W - 14, top: 10, bottom: H - 42 };
    const shown = chart.series.map((s, n) => ({ ...s, x: acrossOf(s), n: colourAt(n) }))
      .filter((s) => !state.hidden.has(s.n));
    const xLabel = shared ? shared.labels[shared.across] : chart.x_label;
    const points = shown.flatMap((s) => s.x.map((x, i) => [x, s.y[i]]))
      .filter(([x, y]) => x !== null && y !== null && (!state.log_x || x > 0) && (!state.log_y || y > 0));
    holder.replaceChildren();
    state.at = null; // what stood there may be hidden now, or lie elsewhere
    readout.textContent = "";
    if (!points.length) {
      holder.append(el("p", { class: "note", textContent: "There is nothing to draw." }));
      return;
    }
    const range = (at, log) => {
      const values = points.map((p) => p[at]);
      let low = values.reduce((a, b) => Math.min(a, b));
      let high = values.reduce((a, b) => Math.max(a, b));
      for (const mark of chart.marks) {
        if ((mark.axis === "x") !== (at === 0) || (log && mark.at <= 0)) continue;
        low = Math.min(low, mark.at);
        high = Math.max(high, mark.at);
      }
      if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - 0.5, high + 0.5];
      return at === 1 && !log ? [low - 0.04 * (high - low), high + 0.04 * (high - low)] : [low, high];
    };
    const scale = ([low, high], from, to, log) => (v) => {
      const share = log ? Math.log(v / low) / Math.log(high / low) : (v - low) / (high - low);
      return from + share * (to - from);
    };
    const [xs, ys] = [range(0, state.log_x), range(1, state.log_y)];
    const x = scale(xs, box.left, box.right, state.log_x);
    const y = scale(ys, box.bottom, box.top, state.log_y);
    const picture = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", tabindex: 0,
      "aria-label": `${chart.title}: ${chart.series.map((s) => s.name).join(", ")}` });
    for (const v of ticks(...xs, state.log_x)) {
      picture.append(svg("line", { class: "axis", x1: x(v), x2: x(v), y1: box.top, y2: box.bottom }));
      picture.append(svg("text", { x: x(v), y: box.bottom + 16, "text-anchor": "middle" }, shortNumber(v)));
    }
    for (const v of ticks(...ys, state.log_y)) {
      picture.append(svg("line", { class: "axis", x1: box.left, x2: box.right, y1: y(v), y2: y(v) }));
      picture.append(svg("text", { x: box.left - 6, y: y(v) + 4, "text-anchor": "end" }, shortNumber(v)));
    }
    picture.append(svg("text", { x: (box.left + box.right) / 2, y: H - 8, "text-anchor": "middle" }, xLabel));
    picture.append(svg("text", { x: 0, y: 0, "text-anchor": "middle",
      transform: `translate(12 ${(box.top + box.bottom) / 2}) rotate(-90)` }, chart.y_label));
    for (const mark of chart.marks) {
      const across = mark.axis === "x";
      const at = across ? x(mark.at) : y(mark.at);
      picture.append(svg("line", { stroke: css("--soft"), "stroke-dasharray": "4 4",
        x1: across ? at : box.left, x2: across ? at : box.right,
        y1: across ? box.top : at, y2: across ? box.bottom : at }));
      picture.append(svg("text", { x: across ? at - 5 : box.right - 4, y: across ? box.top + 12 : at - 5,
        "text-anchor": "end" }, `${mark.name} ${shortNumber(mark.at)}`));
    }
    for (const series of shown) {
      let path = "";
      let pen = "M";
      let count = 0;
      series.x.forEach((v, i) => {
        const w = series.y[i];
        const usable = v !== null && w !== null && (!state.log_x || v > 0) && (!state.log_y || w > 0);
        if (!usable) { pen = "M"; return; }
        path += `${pen}${x(v).toFixed(2)} ${y(w).toFixed(2)}`;
        pen = "L";
        count++;
        if (series.labels) { // points that no line joins
          picture.append(svg("circle", { cx: x(v), cy: y(w), r: 4, fill: colourOf(series.n) },
            svg("title", {}, series.labels[i])));
        } else if (series.x.length < 40) {
          picture.append(svg("circle", { cx: x(v), cy: y(w), r: 2.5, fill: colourOf(series.n) }));
        }
      });
      if (count > 1 && !series.labels) {
        picture.append(svg("path", { d: path, fill: "none", stroke: colourOf(series.n),
          "stroke-width": 1.8, "stroke-dasharray": series.dash || "none" }));
      }
    }
    const cursor = svg("line", { stroke: css("--ink"), y1: box.top, y2: box.bottom, visibility: "hidden" });
    picture.append(cursor);
    const places = [...new Set(points.map((p) => p[0]))].sort((a, b) => a - b);
    const tell = (index) => {
      const at = places[index];
      state.at = index;
      cursor.setAttribute("x1", x(at));
      cursor.setAttribute("x2", x(at));
      cursor.setAttribute("visibility", "visible");
      // Runs share no places over time: each says what it said last.
      const placeOf = (s) => (shared ? s.x.findLastIndex((v) => v !== null && v <= at) : s.x.indexOf(at));
      const parts = shown.map((s) => [s.name, s.y[placeOf(s)]]).filter((p) => p[1] !== undefined);
      readout.textContent = `${xLabel} ${at.toLocaleString("en")}: `
        + parts.map(([name, value]) => `${name} ${show(value, 4)}`).join(", ");
    };
    picture.addEventListener("pointermove", (event) => {
      const frame = picture.getBoundingClientRect();
      const at = (event.clientX - frame.left) * W / frame.width;
      let best = 0;
      places.forEach((p, i) => { if (Math.abs(x(p) - at) < Math.abs(x(places[best]) - at)) best = i; });
      tell(best);
    });
    picture.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      tell(Math.max(0, Math.min(places.length - 1, (state.at ?? -step) + step)));
    });
    holder.append(picture);
  }
  return { section, draw };
}

function legendButton(name, number, hidden, redraw) { // a series' colour and name, to hide it
  const swatch = el("span", { class: "swatch" });
  drawn(() => { swatch.style.background = colourOf(number); });
  const button = el("button", { type: "button", "aria-pressed": "true",
    onclick: () => {
      const off = hidden.has(number);
      if (off) hidden.delete(number); else hidden.add(number);
      button.setAttribute("aria-pressed", String(off));
      redraw();
    } }, swatch, name);
  return button;
}

async function heatMap(chart) {
  const { shape: [rows, columns], values } = await unpack(chart.values);
  const known = values.filter((v) => !Number.isNaN(v) && (!chart.log || v > 0));
  const most = known.reduce((a, b) => Math.max(a, Math.abs(b)), 0) || 1;
  const least = known.reduce((a, b) => Math.min(a, b), most);
  const span = Math.log(most / least) || 1;
  const shadeOf = (v) => {
    if (Number.isNaN(v) || (chart.log && v <= 0)) return 0;
    return chart.log ? 0.06 + 0.94 * Math.log(v / least) / span : v / most;
  };
  const canvas = el("canvas", { class: "wide", tabIndex: 0, role: "img",
    "aria-label": `${chart.title}, ${rows} by ${columns}` });
  const readout = el("p", { class: "note",
    textContent: `Across: ${chart.x_label}; down: ${chart.y_label}. From ${show(least)} to ${show(most)}.` });
  const section = el("section", { class: "chart" }, el("h2", { textContent: chart.title }));
  if (chart.says) section.append(el("p", { class: "says", textContent: chart.says }));
  section.append(el("div", { class: "map" }, mapLabels("rows", chart.rows), canvas,
    el("span"), mapLabels("columns", chart.columns)), readout);
  canvas.style.imageRendering = "pixelated";
  function draw() {
    canvas.width = columns;
    canvas.height = rows;
    const square = chart.x_label === chart.y_label;
    const width = canvas.clientWidth;
    canvas.style.height = `${Math.max(120, Math.min(square ? width : 420, square ? 480 : 420))}px`;
    if (square) canvas.style.maxWidth = "480px";
    shadePicture(canvas, (i) => shadeOf(values[i]));
  }
  const at = { row: 0, column: 0 };
  const tell = () => {
    const value = values[at.row * columns + at.column];
    const row = String(chart.rows[at.row]);
    readout.textContent = `${chart.x_label} ${chart.columns[at.column].toLocaleString("en")}, `
      + `${row.includes(chart.y_label) ? row : `${chart.y_label} ${row}`}: `
      + (Number.isNaN(value) ? "nothing" : show(value, 4));
  };
  canvas.addEventListener("pointermove", (event) => {
    const frame = canvas.getBoundingClientRect();
    const part = (v, size, count) => Math.max(0, Math.min(count - 1, Math.floor(v / size * count)));
    at.column = part(event.clientX - frame.left, frame.width, columns);
    at.row = part(event.clientY - frame.top, frame.height, rows);
    tell();
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    at.row = Math.max(0, Math.min(rows - 1, at.row + step[0]));
    at.column = Math.max(0, Math.min(columns - 1, at.column + step[1]));
    tell();
  });
  return { section, draw };
}

function mapLabels(side, names) { // beside each row if there is room, else the ends
  const all = side === "rows" && names.length <= 16;
  const some = all || names.length < 3 ? names : [names[0], names.at(-1)];
  return el("div", { class: `${side}${all ? " each" : ""}`, "aria-hidden": "true" },
    ...some.map((name) => el("span", { textContent: name.toLocaleString("en") })));
}

async function addCharts(charts, page, shared = null) {
  const box = el("div", { class: "charts" });
  page.append(box);
  const made = [];
  for (const chart of charts) {
    made.push(chart.form === "lines" ? lineChart(chart, shared) : await heatMap(chart));
    box.append(made.at(-1).section);
  }
  made.forEach((one) => drawn(one.draw)); // when all have their places, and so their widths
}
