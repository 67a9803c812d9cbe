async function drawView(view, page) {
  const { tokens, nearest } = view.data;
  const points = (await unpack(view.data.points)).values;
  const norms = (await unpack(view.data.norms)).values;
  const { shape: [, numNear], values: cosines } = await unpack(view.data.cosines);
  const sorts = [...new Set(tokens.map((token) => token.sort))].sort();
  const hidden = new Set();
  const [px, py] = [0, 1].map((c) => tokens.map((_, n) => points[2 * n + c]));
  const bounds = (values) => [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  const [xs, ys] = [bounds(px), bounds(py)];
  const state = { zoom: 1, x: (xs[0] + xs[1]) / 2, y: (ys[0] + ys[1]) / 2, chosen: null };

  const input = el("input", { type: "search", placeholder: "find a token", "aria-label": "find a token" });
  const reset = el("button", { type: "button", textContent: "whole map", onclick: () => {
    Object.assign(state, { zoom: 1, x: (xs[0] + xs[1]) / 2, y: (ys[0] + ys[1]) / 2 });
    draw();
  } });
  const zoomer = (name, by) => el("button", { type: "button", textContent: name, "aria-label": by > 1 ? "nearer" : "farther",
    onclick: () => { state.zoom = Math.max(0.5, state.zoom * by); draw(); } });
  page.append(el("div", { class: "bar" }, input, zoomer("+", 1.5), zoomer("−", 1 / 1.5), reset));
  const legend = el("div", { class: "legend" });
  sorts.forEach((sort, n) => {
    const swatch = el("span", { class: "swatch" });
    drawn(() => { swatch.style.background = colourOf(n); });
    const count = tokens.filter((token) => token.sort === sort).length;
    const button = el("button", { type: "button", "aria-pressed": "true", onclick: () => {
      if (hidden.has(sort)) hidden.delete(sort); else hidden.add(sort);
      button.setAttribute("aria-pressed", String(!hidden.has(sort)));
      draw();
    } }, swatch, `${sort} (${count.toLocaleString("en")})`);
    legend.append(button);
  });
  page.append(legend);
  const canvas = el("canvas", { class: "wide movable", tabIndex: 0, role: "img",
    "aria-label": "map of the tokens; arrow keys move, plus and minus zoom" });
  const [side, found] = [el("div", { class: "panel", "aria-live": "polite" }), el("div", { class: "strip" })];
  page.append(found, canvas, el("p", { class: "note",
    textContent: "Drag to move, scroll or + and - to zoom, click a token for its neighbours." }), side);

  let size = { width: 1, height: 1 };
  const unit = () => 0.92 * state.zoom * Math.min(size.width / (xs[1] - xs[0] || 1), size.height / (ys[1] - ys[0] || 1));
  const toScreen = (n) => [size.width / 2 + (px[n] - state.x) * unit(), size.height / 2 - (py[n] - state.y) * unit()];
  const inside = ([x, y]) => x > -20 && y > -20 && x < size.width + 20 && y < size.height + 20;
  function draw() {
    const made = canvasOf(canvas, Math.max(320, Math.min(620, innerHeight * 0.7, canvas.clientWidth)));
    size = made;
    const { pen } = made;
    pen.fillStyle = css("--panel");
    pen.fillRect(0, 0, size.width, size.height);
    const near = new Set(state.chosen === null ? [] : nearest[state.chosen]);
    const visible = [];
    const colours = sorts.map((_, n) => colourOf(n));
    tokens.forEach((token, n) => {
      if (hidden.has(token.sort)) return;
      const at = toScreen(n);
      if (!inside(at)) return;
      visible.push(n);
      pen.globalAlpha = state.chosen === null || near.has(n) || n === state.chosen ? 0.85 : 0.25;
      pen.fillStyle = colours[sorts.indexOf(token.sort)];
      pen.beginPath();
      pen.arc(at[0], at[1], near.has(n) || n === state.chosen ? 5 : 2.6, 0, 7);
      pen.fill();
    });
    pen.globalAlpha = 1;
    pen.fillStyle = css("--ink");
    const written = (n, bold) => {
      const [x, y] = toScreen(n);
      pen.font = `${bold ? "bold " : ""}12px ui-monospace, Menlo, Consolas, monospace`;
      pen.fillText(tokens[n].label.slice(0, 24), x + 7, y + 4);
    };
    if (state.chosen !== null) {
      near.forEach((n) => written(n, false));
      written(state.chosen, true);
    } else { // names where there is room for them
      const taken = new Set();
      for (const n of visible) {
        const [x, y] = toScreen(n);
        const cells = []; // of 8 by 9 pixels, under the name and around it
        for (let i = 0; i <= Math.min(24, tokens[n].label.length) + 1; i++) {
          for (const j of [-1, 0, 1]) cells.push(`${Math.floor(x / 8) + i},${Math.floor(y / 9) + j}`);
        }
        if (cells.some((cell) => taken.has(cell))) continue;
        cells.forEach((cell) => taken.add(cell));
        written(n, false);
      }
    }
  }
  function nearestTo(event) {
    const frame = canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - frame.left, event.clientY - frame.top];
    let [best, distance] = [null, 18 ** 2];
    tokens.forEach((token, n) => {
      if (hidden.has(token.sort)) return;
      const at = toScreen(n);
      const d = (at[0] - x) ** 2 + (at[1] - y) ** 2;
      if (d < distance) [best, distance] = [n, d];
    });
    return best;
  }
  function choose(n) {
    state.chosen = n;
    draw();
    if (n === null) { side.replaceChildren(el("p", { class: "note", textContent: "No token is chosen." })); return; }
    const token = tokens[n];
    const list = el("div", { class: "strip" }, ...nearest[n].map((m, i) => el("button", { type: "button", class: "token",
      textContent: `${tokens[m].label}  ${cosines[n * numNear + i].toFixed(3)}`, onclick: () => choose(m) })));
    side.replaceChildren(el("p", {}, el("b", { class: "mono", textContent: token.label }),
      ` · id ${token.id}${token.hex ? ` · bytes ${token.hex}` : ""} · length ${show(norms[n])}`),
      el("p", { class: "note", textContent: "Its nearest tokens, by cosine:" }), list);
  }
  let drag = null;
  canvas.addEventListener("pointerdown", (event) => {
    drag = { x: event.clientX, y: event.clientY, moved: false };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (drag) {
      const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
      if (!drag.moved && Math.hypot(dx, dy) < 4) return;
      drag = { x: event.clientX, y: event.clientY, moved: true };
      state.x -= dx / unit();
      state.y += dy / unit();
      draw();
      return;
    }
    const n = nearestTo(event);
    if (n === null) hideTip();
    else showTip(event, `${tokens[n].label}\nid ${tokens[n].id}, ${tokens[n].sort}\nnearest: ${nearest[n].slice(0, 3).map((m) => tokens[m].label).join("  ")}`);
  });
  canvas.addEventListener("pointerup", (event) => {
    if (drag && !drag.moved) choose(nearestTo(event));
    drag = null;
  });
  canvas.addEventListener("pointercancel", () => { drag = null; });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const frame = canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - frame.left - size.width / 2, event.clientY - frame.top - size.height / 2];
    const before = unit();
    state.zoom = Math.max(0.5, state.zoom * Math.exp(-event.deltaY / 400));
    state.x += x / before - x / unit();
    state.y -= y / before - y / unit();
    draw();
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const step = 60 / unit();
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] };
    if (moves[event.key]) [state.x, state.y] = [state.x + moves[event.key][0], state.y + moves[event.key][1]];
    else if (event.key === "+" || event.key === "=") state.zoom *= 1.5;
    else if (event.key === "-") state.zoom = Math.max(0.5, state.zoom / 1.5);
    else if (event.key === "Escape") { choose(null); return; }
    else return;
    event.preventDefault();
    draw();
  });
  input.addEventListener("input", () => {
    const text = input.value.replaceAll(" ", "·");
    if (!text) { found.replaceChildren(); return; }
    const fits = tokens.map((_, n) => n).filter((n) => tokens[n].label.includes(text) || String(tokens[n].id) === input.value);
    const rank = (n) => [tokens[n].label.replace("·", "") === text ? 0 : 1, tokens[n].label.length];
    fits.sort((a, b) => rank(a)[0] - rank(b)[0] || rank(a)[1] - rank(b)[1] || a - b);
    found.replaceChildren(...fits.slice(0, 24).map((n) => el("button", { type: "button", class: "token",
      textContent: tokens[n].label, onclick: () => choose(n) })),
      el("span", { class: "note", textContent: fits.length > 24 ? ` and ${fits.length - 24} more` : fits.length ? "" : "no such token" }));
  });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") found.querySelector("button")?.click();
  });
  drawn(draw);
  choose(null);
}
