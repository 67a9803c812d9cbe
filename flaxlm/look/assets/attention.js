const ROW = 16; // pixels of a line of text, in which a token can be read
const MONO = "ui-monospace, Menlo, Consolas, monospace";

async function openMap(map, perHead) {
  const { shape: [L, N, T, S], values } = await unpack(map.weights);
  const opened = { ...map, L, N, T, S, values, perHead, vectorsOf: () => null };
  opened.weight = (l, n, t, s) => values[((l * N + n) * T + t) * S + s];
  if (!map.vectors) return opened;
  const sides = {};
  for (const side of ["queries", "keys"]) {
    sides[side] = { ...await unpack(map.vectors[side].values), most: map.vectors[side].most };
  }
  opened.vectorsOf = (l, n) => { // this head's numbers, if the page has them
    const at = map.vectors.heads.indexOf(l * N + n);
    if (at < 0) return null;
    const number = ({ shape: [, rows, H], values: shares, most }) => (row, d) =>
      (2 * shares[(at * rows + row) * H + d] - 1) * most[at];
    return { H: sides.queries.shape[2], query: number(sides.queries), key: number(sides.keys) };
  };
  return opened;
}

function products(vectors, t, s) {
  return Array.from({ length: vectors.H }, (_, d) => vectors.query(t, d) * vectors.key(s, d));
}

const total = (numbers) => numbers.reduce((a, b) => a + b, 0);
const cutLabel = (label, most) => (label.length > most ? `${label.slice(0, most - 1)}…` : label);

// A window on a picture that may be larger: it scrolls, and what is seen is drawn.
function pane(name) {
  const canvas = el("canvas");
  const inner = el("div", {}, canvas);
  const box = el("div", { class: "pane", tabIndex: 0, role: "application", "aria-label": name }, inner);
  function open(width, height) { // of the whole picture; the pen writes at its coordinates
    inner.style.width = `${Math.max(1, width)}px`;
    inner.style.height = `${height}px`;
    canvas.style.width = `${box.clientWidth}px`;
    const seen = canvasOf(canvas, Math.min(box.clientHeight, height));
    return { ...seen, left: box.scrollLeft, top: box.scrollTop };
  }
  function show(x, y, margin) { // scrolls until a place is seen
    const [w, h] = [box.clientWidth, box.clientHeight];
    if (x !== null && x < box.scrollLeft + margin) box.scrollLeft = x - margin - ROW;
    else if (x !== null && x > box.scrollLeft + w - 2 * ROW) box.scrollLeft = x - w + 3 * ROW;
    if (y < box.scrollTop + (x === null ? 0 : margin)) box.scrollTop = y - (x === null ? 0 : margin) - ROW;
    else if (y > box.scrollTop + h - 2 * ROW) box.scrollTop = y - h + 3 * ROW;
  }
  const place = (event) => {
    const frame = box.getBoundingClientRect();
    return [event.clientX - frame.left - box.clientLeft, event.clientY - frame.top - box.clientTop];
  };
  return { box, open, show, place };
}

async function drawView(view, page) {
  const maps = await Promise.all(view.data.maps.map((map, m) => openMap(map, view.figures.maps[m].per_head)));
  const state = { map: 0, layer: 0, head: 0, query: 0, key: 0, side: "query", over: null, shade: 0, whole: false };
  const now = () => maps[state.map];
  const weight = (t, s) => now().weight(state.layer, state.head, t, s);
  const strongest = (count, of) => Array.from({ length: count }, (_, i) => i).sort((a, b) => of(b) - of(a) || b - a);
  const sees = (t, s) => !now().causal || s <= t;

  function begin(m) { // with a head that the page tells most of
    const map = maps[m];
    const strength = (i) => (map.vectors && !map.vectors.heads.includes(i) ? -1 : map.perHead[i].strength);
    const [best] = strongest(map.perHead.length, strength);
    Object.assign(state, { map: m, layer: Math.floor(best / map.N), head: best % map.N, query: map.T - 1, side: "query" });
    [state.key] = strongest(map.S, (s) => weight(state.query, s));
  }
  begin(0);
  if (maps.length > 1) {
    page.append(choice("which attention", maps.map((map) => map.title), 0, (m) => { begin(m); build(); }));
  }
  const body = el("div");
  page.append(body);

  function build() {
    const map = now();
    body.replaceChildren();
    redraws.length = 0;
    const grid = headGrid(map, state, (layer, head) => { Object.assign(state, { layer, head }); refresh(); });
    body.append(el("h2", { textContent: "All heads" }), el("p", { class: "says",
      textContent: "One map a head, a row a layer. Down: the token that looks; across: the tokens that it looks at. "
        + "Choose one; arrow keys walk." }), grid.box);
    const [title, facts] = [el("h2"), el("p", { class: "says" })];
    const readout = el("p", { class: "mono", "aria-live": "polite" });
    const picture = mapPane(map, state, grid.pictures, stay, hover);
    const lines = linePane(map, state, weight, stay, hover);
    const [lists, sum] = [el("div", { class: "two panel" }), el("div", { class: "panel" })];
    const shades = ["square root of the weight", "weight", ...(map.vectors ? ["score before the softmax"] : [])];
    state.shade = Math.min(state.shade, shades.length - 1);
    const tools = el("div", {}, choice("shade of the map", shades, state.shade, (n) => {
      state.shade = n;
      grid.redraw();
      picture.draw();
    }));
    if (Math.max(map.T, map.S) > 24) {
      tools.append(choice("size", ["every token can be read", "the whole text"], state.whole ? 1 : 0,
        (n) => { state.whole = n === 1; redraw(); picture.reveal(); lines.reveal(); }));
    }
    body.append(title, facts, tools, el("div", { class: "two" },
      el("div", {}, el("h3", { textContent: "Map" }), el("p", { class: "note", textContent: "Down: who attends. Across: to whom." }), picture.box),
      el("div", {}, el("h3", { textContent: "Lines" }), el("p", { class: "note",
        textContent: "Left: who attends. Right: to whom. A line is as strong as the weight." }), lines.box)),
    el("p", { class: "note", textContent: "Point at a token, a line or a cell; a click stays. Arrow keys: up and down "
      + "another token that attends, left and right another that it attends to." }), readout, lists, sum);
    // The text itself, in which a token shows to whom it attends.
    const text = map.kind === "cross" ? null : strip(map.queries, "tokens of the text",
      (query) => hover({ query, side: "query" }), (query) => stay({ query, side: "query" }));
    function shadeText() {
      const query = state.over?.query ?? state.query;
      text?.tokens.forEach((token, i) => {
        token.classList.toggle("chosen", i === query);
        paint(token, Math.sqrt(Math.min(1, weight(query, i))));
      });
    }
    if (text) {
      text.box.addEventListener("pointerleave", () => hover(null));
      body.append(el("h3", { textContent: "In the text" }), text.box);
    }
    const table = headTable(map, state, (layer, head) => { Object.assign(state, { layer, head }); refresh(); });
    body.append(el("h2", { textContent: "What tells the heads apart" }), el("p", { class: "says",
      textContent: "Means over the tokens" + (map.causal ? ", the first one apart, which can only attend to itself" : "")
        + ". Entropy in bits: 0 is one token, more is spread wider. Shares are of the weight; a dash: no token here has such a place." }),
    el("div", { class: "scroll", tabIndex: 0 }, table.table), el("p", { class: "note", textContent: view.data.rule }));

    for (const box of [picture.box, lines.box]) {
      box.addEventListener("pointerleave", () => { hideTip(); hover(null); });
      box.addEventListener("keydown", (event) => {
        const step = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key];
        if (!step) return;
        event.preventDefault();
        const query = Math.max(0, Math.min(map.T - 1, state.query + step[0]));
        let key = Math.max(0, Math.min(map.S - 1, state.key + step[1]));
        if (map.causal) key = Math.min(key, query);
        stay({ query, key, side: "query" });
        picture.reveal();
        lines.reveal();
      });
    }
    function stay(at) { // on a query, a key, or both: what is not given is the strongest
      const query = at.query ?? strongest(map.T, (t) => weight(t, at.key))[0];
      const key = at.key ?? strongest(map.S, (s) => weight(query, s))[0];
      Object.assign(state, { query, key, side: at.side, over: null });
      redraw();
    }
    function hover(over, event) {
      state.over = over;
      lines.draw();
      picture.draw();
      shadeText();
      if (over && event) showTip(event, tellPlace(over));
    }
    const name = (side, at) => `${map[side === "query" ? "queries" : "keys"][at].label} (${at})`;
    function tellPlace({ query, key, side }) {
      if (query !== undefined && key !== undefined) return tellPair(query, key);
      const fan = side === "query" ? strongest(map.S, (s) => weight(query, s)).map((s) => [query, s])
        : strongest(map.T, (t) => weight(t, key)).map((t) => [t, key]);
      return fan.slice(0, 4).map(([t, s]) => tellPair(t, s)).join("\n");
    }
    function tellPair(t, s) {
      return `${name("query", t)} → ${name("key", s)}: ${sees(t, s) ? percent(weight(t, s)) : "cannot see it"}`;
    }
    function redraw() {
      picture.draw();
      lines.draw();
      shadeText();
      const { query, key } = state;
      readout.textContent = tellPair(query, key);
      const barsOf = (side, at, count, of) => bars(strongest(count, of).slice(0, 6)
        .map((i) => [name(side, i), Math.min(1, of(i)), percent(of(i))]));
      lists.replaceChildren(
        el("div", {}, el("p", { class: "note" }, el("b", { class: "mono", textContent: name("query", query) }), " attends to"),
          barsOf("key", query, map.S, (s) => weight(query, s))),
        el("div", {}, el("p", { class: "note" }, el("b", { class: "mono", textContent: name("key", key) }), " is attended to by"),
          barsOf("query", key, map.T, (t) => weight(t, key))));
      drawProducts(sum, map, state, view.data.scoring, tellPair);
      table.fill();
    }
    function refresh() {
      grid.press();
      const entry = map.perHead[state.layer * map.N + state.head];
      const kind = map.layer_kinds[state.layer];
      title.textContent = `Layer ${entry.layer}, head ${entry.head}${kind ? ` (${kind})` : ""}: ${entry.looks_at}`;
      facts.textContent = `As widely spread as an even look at ${show(2 ** entry.entropy)} tokens (${show(entry.entropy)} bits)`
        + (entry.distance === undefined ? "." : `, which are ${show(entry.distance)} tokens away on average.`);
      redraw();
    }
    drawn(refresh);
    picture.reveal();
    lines.reveal();
  }
  build();
}

const shadeOf = (state, w) => (state.shade === 1 ? w : Math.sqrt(Math.max(0, w)));

function headGrid(map, state, choose) {
  const box = el("div", { role: "group", "aria-label": "heads" });
  const [buttons, pictures] = [[], []];
  for (let l = 0; l < map.L; l++) {
    const row = el("div", { class: "layer" });
    row.style.gridTemplateColumns = `repeat(auto-fill, minmax(min(100%, max(72px, min(150px, calc((100% - ${6 * map.N}px) / ${map.N})))), 1fr))`;
    for (let n = 0; n < map.N; n++) {
      const canvas = el("canvas", { width: map.S, height: map.T });
      const facts = map.perHead[l * map.N + n];
      const button = el("button", { type: "button", class: "head", "aria-pressed": "false",
        "aria-label": `layer ${map.layers[l]}, head ${map.heads[n]}: ${facts.looks_at}`, onclick: () => choose(l, n) },
      canvas, `L${map.layers[l]} H${map.heads[n]}`, el("br"), facts.looks_at);
      if (map.layer_kinds[l]) button.title = map.layer_kinds[l];
      buttons.push(button);
      pictures.push(canvas);
      row.append(button);
    }
    box.append(row);
  }
  box.addEventListener("keydown", (event) => {
    const at = buttons.indexOf(document.activeElement);
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: map.N, ArrowUp: -map.N }[event.key];
    if (at < 0 || !step || !buttons[at + step]) return;
    event.preventDefault();
    buttons[at + step].focus();
    buttons[at + step].click();
  });
  function redraw() {
    const size = map.T * map.S;
    pictures.forEach((canvas, i) => shadePicture(canvas, (cell) => shadeOf(state, map.values[i * size + cell])));
  }
  function press() {
    buttons.forEach((button, i) => {
      const on = i === state.layer * map.N + state.head;
      button.setAttribute("aria-pressed", String(on));
      button.tabIndex = on ? 0 : -1;
    });
  }
  drawn(redraw);
  return { box, pictures, redraw, press };
}

// The scores of the chosen head as a picture, each beside the largest; null if not known.
function scorePicture(map, state) {
  const vectors = map.vectorsOf(state.layer, state.head);
  if (!vectors) return null;
  const scores = new Float32Array(map.T * map.S);
  let most = 1e-30;
  for (let t = 0; t < map.T; t++) {
    for (let s = 0; s < (map.causal ? t + 1 : map.S); s++) {
      const score = total(products(vectors, t, s));
      scores[t * map.S + s] = score;
      most = Math.max(most, Math.abs(score));
    }
  }
  const canvas = el("canvas", { width: map.S, height: map.T });
  shadePicture(canvas, (i) => scores[i] / most);
  return canvas;
}

// Tells of the place under the pointer, and stays at one that is chosen.
function follow(box, placeOf, stay, hover, draw) {
  box.addEventListener("pointermove", (event) => {
    const at = placeOf(event);
    hover(at, event);
    if (!at) hideTip();
  });
  box.addEventListener("click", (event) => { const at = placeOf(event); if (at) stay(at); });
  box.addEventListener("scroll", draw);
}

// The map of the chosen head, with its tokens along the sides.
function mapPane(map, state, pictures, stay, hover) {
  const view = pane(`map of the head: ${map.T} by ${map.S} tokens; arrow keys walk`);
  const longest = [...map.queries, ...map.keys].reduce((most, piece) => Math.max(most, piece.label.length), 1);
  const most = Math.min(18, longest);
  let frame = { margin: 0, cell: 1 };
  let scores = { of: "", picture: null };
  function draw() {
    const width = view.box.clientWidth;
    const margin = 10 + 6.7 * Math.min(most, width < 420 ? 13 : most);
    const fit = (width - margin - 1) / map.S;
    const cell = state.whole ? Math.min(fit, 620 / map.T) : Math.max(13, Math.min(40, fit));
    frame = { margin, cell };
    const seen = view.open(margin + map.S * cell, margin + map.T * cell + 1);
    const { pen, left, top } = seen;
    const [x, y] = [(s) => margin + s * cell - left, (t) => margin + t * cell - top];
    const key = [state.layer, state.head, css("--high")].join();
    if (state.shade === 2 && scores.of !== key) scores = { of: key, picture: scorePicture(map, state) };
    const own = (state.shade === 2 && scores.picture) || pictures[state.layer * map.N + state.head];
    pen.save();
    pen.beginPath();
    pen.rect(margin, margin, seen.width, seen.height);
    pen.clip();
    pen.imageSmoothingEnabled = false;
    pen.drawImage(own, x(0), y(0), map.S * cell, map.T * cell);
    const at = state.over ?? { query: state.query, key: state.key };
    pen.strokeStyle = css("--accent");
    pen.lineWidth = 1.5;
    if (at.query !== undefined) pen.strokeRect(x(0), y(at.query), map.S * cell, cell);
    if (at.key !== undefined) pen.strokeRect(x(at.key), y(0), cell, map.T * cell);
    pen.restore();
    pen.strokeStyle = css("--line");
    pen.lineWidth = 1;
    pen.strokeRect(margin, margin, Math.min(x(map.S), seen.width) - margin, Math.min(y(map.T), seen.height) - margin);
    const every = Math.max(1, Math.ceil(12 / cell)); // as many labels as can be read
    const fits = Math.floor((margin - 8) / 6.7);
    const write = (pieces, chosen, place, turn) => pieces.forEach((piece, i) => {
      const p = place(i) + cell / 2;
      const on = i === chosen;
      if (p < margin || p > (turn ? seen.width : seen.height)) return;
      if (!on && (i % every || (every > 1 && chosen !== undefined && Math.abs(i - chosen) < every))) return;
      pen.save();
      pen.fillStyle = css(on ? "--accent" : "--ink");
      pen.font = `${on ? "bold " : ""}11px ${MONO}`;
      pen.textBaseline = "middle";
      pen.textAlign = turn ? "left" : "right";
      pen.translate(...(turn ? [p, margin - 5] : [margin - 5, p]));
      if (turn) pen.rotate(-Math.PI / 2);
      pen.fillText(cutLabel(piece.label, fits), 0, 0);
      pen.restore();
    });
    write(map.queries, at.query, y, false);
    write(map.keys, at.key, x, true);
  }
  function placeOf(event) {
    const [px, py] = view.place(event);
    const s = Math.floor((px + view.box.scrollLeft - frame.margin) / frame.cell);
    const t = Math.floor((py + view.box.scrollTop - frame.margin) / frame.cell);
    const [inX, inY] = [px >= frame.margin && s < map.S, py >= frame.margin && t < map.T];
    if (inX && inY) return { query: t, key: s, side: "query" };
    if (inY) return { query: t, side: "query" };
    return inX ? { key: s, side: "key" } : null;
  }
  follow(view.box, placeOf, stay, hover, draw);
  const reveal = () => {
    const { margin, cell } = frame;
    view.show(margin + state.key * cell, margin + state.query * cell, margin);
  };
  return { box: view.box, draw, reveal };
}

// Tokens in two columns, and a line for each weight.
function linePane(map, state, weight, stay, hover) {
  const view = pane("the same weights as lines between two columns of tokens; arrow keys walk");
  const lengths = (pieces) => pieces.reduce((most, piece) => Math.max(most, piece.label.length), 1);
  let frame = { row: ROW, left: 0, right: 0 };
  const center = (i) => (i + 0.5) * frame.row;
  function draw() {
    const width = view.box.clientWidth;
    const most = Math.max(map.T, map.S);
    const row = state.whole ? Math.min(ROW, 620 / most) : ROW;
    const column = (pieces) => Math.min(28 + 7.3 * lengths(pieces), 0.36 * width);
    frame = { row, left: column(map.queries), right: width - column(map.keys) };
    const seen = view.open(1, most * row);
    const { pen, top } = seen;
    const at = state.over ?? (state.side === "query" ? { query: state.query, side: "query" } : { key: state.key, side: "key" });
    const isOn = (t, s) => (at.query === undefined || at.query === t) && (at.key === undefined || at.key === s);
    const inSight = (i) => center(i) > top && center(i) < top + seen.height;
    pen.strokeStyle = css("--accent");
    for (const on of [false, true]) { // those of the place last, on top
      for (let t = 0; t < map.T; t++) {
        for (let s = 0; s < (map.causal ? t + 1 : map.S); s++) {
          if (isOn(t, s) !== on || !(inSight(t) || inSight(s))) continue;
          const w = Math.min(1, weight(t, s));
          if (w < (on ? 0.002 : 0.02)) continue;
          pen.globalAlpha = on ? Math.min(1, 0.04 + w ** 0.7) : 0.16 * w;
          pen.lineWidth = 0.6 + (on ? 4.4 : 2) * w;
          pen.beginPath();
          pen.moveTo(frame.left, center(t) - top);
          pen.lineTo(frame.right, center(s) - top);
          pen.stroke();
        }
      }
    }
    pen.globalAlpha = 1;
    pen.textBaseline = "middle";
    const every = Math.max(1, Math.ceil(13 / row));
    const write = (pieces, own, other, edge, align) => {
      const ground = shades();
      pieces.forEach((piece, i) => {
        const chosen = at[own] === i;
        const share = at[other] === undefined || at[own] !== undefined ? 0 : Math.min(1, own === "key" ? weight(at.query, i) : weight(i, at.key));
        if (!inSight(i) || (!chosen && share < 0.1 && i % every)) return;
        const x = align === "right" ? edge - 6 : edge + 6;
        const size = Math.floor((align === "right" ? x : seen.width - x) / 7.3);
        pen.font = `${chosen ? "bold " : ""}12px ${MONO}`;
        const label = cutLabel(piece.label, size);
        const wide = pen.measureText(label).width;
        const dark = Math.sqrt(Math.max(0, share));
        if (share > 0.002) {
          pen.fillStyle = `rgb(${ground(dark)})`;
          pen.fillRect(align === "right" ? x - wide - 3 : x - 3, center(i) - top - 7, wide + 6, 14);
        }
        pen.fillStyle = css(chosen ? "--accent" : dark > 0.55 ? "--on-high" : "--ink");
        pen.textAlign = align;
        pen.fillText(label, x, center(i) - top + 0.5);
      });
    };
    write(map.queries, "query", "key", frame.left, "right");
    write(map.keys, "key", "query", frame.right, "left");
  }
  function placeOf(event) {
    const [x, dy] = view.place(event);
    const y = dy + view.box.scrollTop;
    const i = Math.floor(y / frame.row);
    if (x <= frame.left) return i < map.T ? { query: i, side: "query" } : null;
    if (x >= frame.right) return i < map.S ? { key: i, side: "key" } : null;
    const share = (x - frame.left) / (frame.right - frame.left);
    let best = null;
    for (let t = 0; t < map.T; t++) { // the strongest of the lines that pass here
      for (let s = 0; s < (map.causal ? t + 1 : map.S); s++) {
        const w = weight(t, s);
        const away = Math.abs(center(t) + share * (center(s) - center(t)) - y);
        if (w >= 0.02 && away < 4 && (!best || w > best.w)) best = { w, query: t, key: s, side: "query" };
      }
    }
    return best && { query: best.query, key: best.key, side: "query" };
  }
  follow(view.box, placeOf, stay, hover, draw);
  const reveal = () => view.show(null, center(state.query), 0);
  return { box: view.box, draw, reveal };
}

// How the score of the chosen pair comes about, dimension by dimension.
function drawProducts(box, map, state, scoring, tellPair) {
  const { layer, head, query: t, key: s } = state;
  const heading = el("p", { class: "note" }, el("b", { textContent: "Where the weight comes from: " }),
    "the query of the one times the key of the other, number by number.");
  const vectors = map.vectorsOf(layer, head);
  if (!vectors) {
    const flags = `--layer ${map.layers[layer]} --head ${map.heads[head]}`;
    box.replaceChildren(heading, el("p", { textContent: `This page has no room for the queries and keys of this head: ${flags} draws them.` }));
    return;
  }
  const numbers = products(vectors, t, s);
  const score = total(numbers);
  const count = map.causal ? t + 1 : map.S;
  const largest = numbers.map((_, d) => d).sort((a, b) => Math.abs(numbers[b]) - Math.abs(numbers[a])).slice(0, 4);
  const canvas = el("canvas", { class: "wide", role: "img", "aria-label": `queries, keys and products of ${vectors.H} dimensions` });
  box.replaceChildren(heading, canvas, el("p", { textContent: `${tellPair(t, s)}. The ${vectors.H} products add up to a score of `
    + `${show(score)}${scoring ? `; ${scoring}` : ""}; the softmax sets it beside the scores of all that the token sees (up to ${count}).` }),
  el("p", { class: "note", textContent: "The query holds the scale already. Most to the score: " + largest.map((d) =>
    `dimension ${d}: ${show(vectors.query(t, d))} × ${show(vectors.key(s, d))} = ${show(numbers[d])}`).join("; ") + "." }));
  const { pen, width } = canvasOf(canvas, 168);
  const rows = [["query", numbers.map((_, d) => vectors.query(t, d))], ["key", numbers.map((_, d) => vectors.key(s, d))], ["product", numbers]];
  const [from, step] = [58, (width - 58) / vectors.H];
  rows.forEach(([name, values], r) => {
    const most = values.reduce((a, b) => Math.max(a, Math.abs(b)), 1e-30);
    const middle = 28 + 56 * r;
    pen.fillStyle = css("--soft");
    pen.font = "12px system-ui, sans-serif";
    pen.fillText(name, 0, middle + 4);
    pen.fillRect(from, middle, width - from, 1);
    values.forEach((value, d) => {
      pen.fillStyle = css(value < 0 ? "--c1" : "--c0");
      const size = 24 * value / most;
      pen.fillRect(from + d * step, size > 0 ? middle - size : middle, Math.max(1, step - 1), Math.abs(size));
    });
  });
  canvas.addEventListener("pointermove", (event) => {
    const d = Math.floor((event.clientX - canvas.getBoundingClientRect().left - from) / step);
    if (d < 0 || d >= vectors.H) { hideTip(); return; }
    showTip(event, `dimension ${d}\n${show(vectors.query(t, d))} × ${show(vectors.key(s, d))} = ${show(numbers[d])}`);
  });
  canvas.addEventListener("pointerleave", hideTip);
}

function headTable(map, state, choose) {
  const table = el("table");
  const columns = [["layer", "layer"], ["head", "head"], ["looks_at", "looks at"], ["entropy", "entropy"],
    ["distance", "distance"], ["first", "first token"], ["last", "last token"], ["previous", "previous token"],
    ["itself", "itself"], ["next", "next token"], ["induction", "induction"], ["induction_repeated", "induction, random tokens"],
    ["same", "same word"], ["punctuation", "punctuation"], ["blank", "blanks"]].filter(([key]) => key in map.perHead[0]);
  let order = map.perHead.map((_, i) => i);
  const header = el("tr", {}, ...columns.map(([key, name], c) => el("th", { class: key === "looks_at" ? "text" : "" },
    el("button", { type: "button", textContent: name, title: "sort", onclick: () => {
      const value = (i) => map.perHead[i][key] ?? -1;
      const sign = c < 2 ? 1 : -1;
      order = [...order].sort((a, b) => (typeof value(a) === "string" ? value(a).localeCompare(value(b)) : sign * (value(a) - value(b))));
      fill();
    } }))));
  header.append(el("th", { class: "text", textContent: "from the chosen token" }));
  const tbody = el("tbody");
  table.append(el("thead", {}, header), tbody);
  function fill() {
    tbody.replaceChildren(...order.map((i) => {
      const [l, n] = [Math.floor(i / map.N), i % map.N];
      const entry = map.perHead[i];
      const row = el("tr", { class: "choosable" + (l === state.layer && n === state.head ? " chosen" : ""), onclick: () => choose(l, n) });
      for (const [key] of columns) {
        const value = entry[key];
        const text = typeof value === "string" || ["layer", "head"].includes(key) ? value
          : value === null || ["entropy", "distance"].includes(key) ? show(value) : percent(value);
        row.append(el("td", { class: key === "looks_at" ? "text" : "", textContent: text }));
      }
      let best = 0;
      for (let s = 1; s < map.S; s++) if (map.weight(l, n, state.query, s) > map.weight(l, n, state.query, best)) best = s;
      row.append(el("td", { class: "text mono", textContent: `${map.keys[best].label} ${percent(map.weight(l, n, state.query, best))}` }));
      return row;
    }));
  }
  return { table, fill };
}
