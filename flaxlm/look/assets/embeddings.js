async function drawView(view, page) {
  const { tokens } = view.data;
  const moments = [];
  for (const moment of view.data.moments) {
    const opened = { ...moment };
    for (const name of ["plane", "solid", "norms", "cosines"]) opened[name] = await unpack(moment[name]);
    moments.push(opened);
  }
  const sorts = [...new Set(tokens.map((token) => token.sort))].sort();
  const hidden = new Set();
  const state = { moment: 0, solid: false, zoom: 1, x: 0, y: 0, yaw: 0.6, pitch: 0.35, chosen: null };
  const now = () => moments[state.moment];

  const input = el("input", { type: "search", placeholder: "find a token", "aria-label": "find a token" });
  const whole = () => { Object.assign(state, { zoom: 1, x: 0, y: 0, yaw: 0.6, pitch: 0.35 }); draw(); };
  const zoomer = (name, by) => el("button", { type: "button", textContent: name, "aria-label": by > 1 ? "nearer" : "farther",
    onclick: () => zoom(by) });
  const says = el("p", { class: "note" });
  if (moments.length > 1) {
    page.append(choice("when", moments.map((moment) => moment.name), 0, (n) => { state.moment = n; choose(state.chosen); }));
  }
  page.append(choice("map", ["neighbourhoods", "three directions, turning"], 0, (n) => { state.solid = n === 1; whole(); }));
  page.append(el("div", { class: "bar" }, input, zoomer("+", 1.5), zoomer("−", 1 / 1.5),
    el("button", { type: "button", textContent: "whole map", onclick: whole })));
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
    "aria-label": "map of the tokens; arrow keys move or turn it, plus and minus zoom" });
  const [side, found] = [el("div", { class: "panel", "aria-live": "polite" }), el("div", { class: "strip" })];
  page.append(found, canvas, says, side);

  let size = { width: 1, height: 1 };
  let places = []; // of the tokens that are drawn: [token, x, y, depth from -1 to 1]
  // Scaled to the extent of nearly all, so that no far point makes a blob of the others.
  const extent = (numbers) => numbers.sort((a, b) => a - b)[Math.floor(0.997 * (numbers.length - 1))] || 1;
  const column = ({ shape: [count, C], values }, c) => Array.from({ length: count }, (_, n) => Math.abs(values[C * n + c]));
  for (const moment of moments) {
    const { shape: [count], values } = moment.solid;
    moment.reach = Array.from({ length: count }, (_, n) => Math.hypot(...values.slice(3 * n, 3 * n + 3)));
    moment.extents = { x: extent(column(moment.plane, 0)), y: extent(column(moment.plane, 1)), solid: extent(moment.reach) };
  }
  function unit() { // pixels of 1
    const { x, y, solid } = now().extents;
    const [across, up] = state.solid ? [solid, solid] : [x, y];
    return 0.46 * state.zoom * Math.min(size.width / across, size.height / up);
  }
  function turned(x, y, z) {
    const [ca, sa, cb, sb] = [Math.cos(state.yaw), Math.sin(state.yaw), Math.cos(state.pitch), Math.sin(state.pitch)];
    const into = ca * z - sa * x;
    return [ca * x + sa * z, cb * y - sb * into, sb * y + cb * into];
  }
  function project() {
    const { shape: [count, C], values } = state.solid ? now().solid : now().plane;
    const scale = unit();
    places = [];
    for (let n = 0; n < count; n++) {
      if (hidden.has(tokens[n].sort)) continue;
      const own = [values[C * n], values[C * n + 1]];
      const [x, y, z] = state.solid ? turned(...own, values[C * n + 2]) : [...own, 0];
      const at = [size.width / 2 + (x - state.x) * scale, size.height / 2 - (y - state.y) * scale];
      const seen = at[0] > -20 && at[1] > -20 && at[0] < size.width + 20 && at[1] < size.height + 20;
      if (seen) places.push([n, ...at, Math.max(-1, Math.min(1, z / now().extents.solid))]);
    }
    if (state.solid) places.sort((a, b) => b[3] - a[3]); // the nearest last, on top
  }
  function draw() {
    size = canvasOf(canvas, Math.max(320, Math.min(680, innerHeight * 0.75, canvas.clientWidth)));
    const { pen } = size;
    project();
    pen.fillStyle = css("--panel");
    pen.fillRect(0, 0, size.width, size.height);
    const near = new Set(state.chosen === null ? [] : now().nearest[state.chosen]);
    const marked = (n) => near.has(n) || n === state.chosen;
    const colours = sorts.map((_, n) => colourOf(n));
    for (const [n, x, y, z] of places) {
      pen.globalAlpha = (state.chosen === null || marked(n) ? 0.85 : 0.25) * (state.solid ? Math.max(0.25, Math.min(1, 0.65 - 0.5 * z)) : 1);
      pen.fillStyle = colours[sorts.indexOf(tokens[n].sort)];
      pen.beginPath();
      pen.arc(x, y, marked(n) ? 5 : state.solid ? Math.max(1, 2.6 - z) : 2.6, 0, 7);
      pen.fill();
    }
    pen.globalAlpha = 1;
    if (state.solid) drawAxes(pen);
    const first = (n) => (n === state.chosen ? -2 : near.has(n) ? -1 : n); // frequent ones have low ids
    const some = places.filter(([n]) => state.chosen === null || marked(n)).sort((a, b) => first(a[0]) - first(b[0]));
    label(pen, some);
    says.textContent = state.solid
      ? `Three directions with ${now().explained.map((x) => percent(x)).join(", ")} of the variance. Drag or use the arrow keys to turn it, scroll or + and - to zoom.`
      : "Drag or use the arrow keys to move it, scroll or + and - to zoom. Click a token, or find one, for its neighbours.";
  }
  function drawAxes(pen) {
    const [ox, oy] = [46, size.height - 46];
    pen.strokeStyle = css("--soft");
    pen.fillStyle = css("--soft");
    pen.font = "11px system-ui, sans-serif";
    [turned(1, 0, 0), turned(0, 1, 0), turned(0, 0, 1)].forEach(([x, y], axis) => {
      pen.beginPath();
      pen.moveTo(ox, oy);
      pen.lineTo(ox + 32 * x, oy - 32 * y);
      pen.stroke();
      pen.fillText(String(axis + 1), ox + 38 * x - 3, oy - 38 * y + 4);
    });
  }
  function label(pen, some) { // each where its box meets no other: right, left, above, below
    const cells = new Map();
    const keys = ([x, y, w, h]) => {
      const list = [];
      for (let i = Math.floor(x / 60); i <= Math.floor((x + w) / 60); i++) {
        for (let j = Math.floor(y / 20); j <= Math.floor((y + h) / 20); j++) list.push(`${i},${j}`);
      }
      return list;
    };
    const meets = ([x, y, w, h]) => ([a, b, c, d]) => x < a + c && a < x + w && y < b + d && b < y + h;
    const inside = ([x, y, w, h]) => x >= 0 && y >= 0 && x + w <= size.width && y + h <= size.height;
    pen.textBaseline = "middle";
    pen.lineJoin = "round";
    let room = Math.ceil(size.width * size.height / 6000); // more would only clutter
    for (const [n, x, y] of some) {
      if (!room) return;
      const text = tokens[n].label.length > 24 ? `${tokens[n].label.slice(0, 23)}…` : tokens[n].label;
      pen.font = `${n === state.chosen ? "bold " : ""}12px ui-monospace, Menlo, Consolas, monospace`;
      const w = pen.measureText(text).width + 6;
      const boxes = [[x + 4, y - 8, w, 16], [x - 4 - w, y - 8, w, 16], [x - w / 2, y - 21, w, 16], [x - w / 2, y + 5, w, 16]];
      const free = boxes.find((box) => inside(box) && !keys(box).some((key) => (cells.get(key) ?? []).some(meets(box))));
      if (!free) continue;
      room--;
      for (const key of keys(free)) cells.set(key, [...(cells.get(key) ?? []), free]);
      pen.strokeStyle = css("--panel");
      pen.lineWidth = 3;
      pen.strokeText(text, free[0] + 3, free[1] + 8);
      pen.fillStyle = css("--ink");
      pen.fillText(text, free[0] + 3, free[1] + 8);
    }
  }
  function nearestTo(event) {
    const frame = canvas.getBoundingClientRect();
    const [px, py] = [event.clientX - frame.left, event.clientY - frame.top];
    let [best, distance] = [null, 18 ** 2];
    for (const [n, x, y] of places) {
      const d = (x - px) ** 2 + (y - py) ** 2;
      if (d <= distance) [best, distance] = [n, d];
    }
    return best;
  }
  function choose(n) {
    state.chosen = n;
    draw();
    if (n === null) { side.replaceChildren(el("p", { class: "note", textContent: "No token is chosen." })); return; }
    const { nearest, norms, cosines: { shape: [, C], values } } = now();
    const token = tokens[n];
    const list = el("div", { class: "strip" }, ...nearest[n].map((m, i) => el("button", { type: "button", class: "token",
      textContent: `${tokens[m].label}  ${values[n * C + i].toFixed(3)}`, onclick: () => choose(m) })));
    side.replaceChildren(el("p", {}, el("b", { class: "mono", textContent: token.label }),
      ` · id ${token.id}${token.hex ? ` · bytes ${token.hex}` : ""} · length ${show(norms.values[n])}`),
    el("p", { class: "note", textContent: `Its nearest tokens ${now().name}, by cosine:` }), list,
    el("p", { class: "note", textContent: !state.solid && n >= now().plane.shape[0] ? "It is on the turning map only." : "" }));
  }
  function zoom(by) { state.zoom = Math.max(0.5, state.zoom * by); draw(); }
  function move(dx, dy) { // in pixels: the plane is moved, the solid is turned
    if (state.solid) {
      state.yaw += dx / 120;
      state.pitch = Math.max(-1.57, Math.min(1.57, state.pitch + dy / 120));
    } else {
      state.x -= dx / unit();
      state.y += dy / unit();
    }
    draw();
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
      move(dx, dy);
      return;
    }
    const n = nearestTo(event);
    if (n === null) hideTip();
    else showTip(event, `${tokens[n].label}\nid ${tokens[n].id}, ${tokens[n].sort}\nnearest: ${now().nearest[n].slice(0, 3).map((m) => tokens[m].label).join("  ")}`);
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
    if (!state.solid) {
      state.x += x / before - x / unit();
      state.y -= y / before - y / unit();
    }
    draw();
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [24, 0], ArrowRight: [-24, 0], ArrowUp: [0, 24], ArrowDown: [0, -24] };
    if (moves[event.key]) move(...moves[event.key]);
    else if (event.key === "+" || event.key === "=") zoom(1.5);
    else if (event.key === "-") zoom(1 / 1.5);
    else if (event.key === "Escape") choose(null);
    else return;
    event.preventDefault();
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
