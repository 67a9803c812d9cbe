async function drawView(view, page) {
  const maps = [];
  for (const [number, map] of view.data.maps.entries()) {
    const { shape: [L, N, T, S], values } = await unpack(map.weights);
    const weight = (l, n, t, s) => values[((l * N + n) * T + t) * S + s];
    maps.push({ ...map, L, N, T, S, values, weight, perHead: view.figures.maps[number].per_head });
  }
  const state = { map: 0, layer: 0, head: 0, token: 0, backwards: false, root: true, looks: null };
  const now = () => maps[state.map];
  const shadeOf = (w) => (state.root ? Math.sqrt(w) : w);
  const titleOf = (l, n) => `layer ${now().layers[l]}, head ${now().heads[n]}`;

  if (maps.length > 1) {
    page.append(choice("which attention", maps.map((map) => map.title), 0, (n) => {
      Object.assign(state, { map: n, layer: 0, head: 0, token: maps[n].T - 1 });
      build();
    }));
  }
  page.append(choice("shade", ["square root of the weight", "weight"], 0, (n) => { state.root = n === 0; build(); }));
  const body = el("div");
  page.append(body);
  state.token = maps[0].T - 1;

  function build() {
    const map = now();
    body.replaceChildren();
    redraws.length = 0;
    body.append(el("h2", { textContent: "All heads" }), el("p", { class: "says",
      textContent: "One map a head, a row a layer. Down: the token that looks; across: the tokens that it looks at. "
        + "Choose one; arrow keys walk." }));
    const grid = el("div", { class: "grid", role: "group", "aria-label": "heads" });
    grid.style.gridTemplateColumns = `repeat(${map.N}, minmax(58px, ${map.N > 6 ? "1fr" : "150px"}))`;
    const [buttons, pictures] = [[], []];
    for (let l = 0; l < map.L; l++) {
      for (let n = 0; n < map.N; n++) {
        const canvas = el("canvas", { width: map.S, height: map.T });
        const facts = map.perHead[l * map.N + n];
        const button = el("button", { type: "button", class: "head", "aria-pressed": "false",
          "aria-label": `${titleOf(l, n)}: ${facts.looks_at}`,
          onclick: () => { state.layer = l; state.head = n; refresh(); } },
          canvas, `L${map.layers[l]} H${map.heads[n]}`, el("br"), facts.looks_at);
        if (map.layer_kinds[l]) button.title = map.layer_kinds[l];
        buttons.push(button);
        pictures.push(canvas);
        grid.append(button);
        drawn(() => fill(canvas, l, n));
      }
    }
    grid.addEventListener("keydown", (event) => {
      const at = buttons.indexOf(document.activeElement);
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: map.N, ArrowUp: -map.N }[event.key];
      if (at < 0 || !step || !buttons[at + step]) return;
      event.preventDefault();
      buttons[at + step].focus();
      buttons[at + step].click();
    });
    body.append(grid);

    const title = el("h2");
    const facts = el("p", { class: "says" });
    const big = el("canvas", { class: "wide" });
    const cross = map.kind === "cross";
    const queries = strip(map.queries, "tokens", (t) => look(t, false), (t) => stay(t, false));
    const keys = cross ? strip(map.keys, "source tokens", (t) => look(t, true), (t) => stay(t, true)) : queries;
    const list = el("div", { class: "panel" });
    const left = el("div", {}, big, el("p", { class: "note", textContent: "Down: who attends. Across: to whom." }));
    const right = el("div");
    if (cross) {
      right.append(el("p", { class: "note", textContent: "The text: a token here shows to which source tokens it attends." }), queries.box,
        el("p", { class: "note", textContent: "The source: a token here shows which tokens attend to it." }), keys.box);
    } else {
      right.append(choice("a token shows", ["to whom it attends", "who attends to it"], state.backwards ? 1 : 0,
        (n) => { state.backwards = n === 1; refresh(); }), queries.box);
    }
    right.append(list);
    queries.box.addEventListener("pointerleave", back);
    if (cross) keys.box.addEventListener("pointerleave", back);
    body.append(title, facts, el("div", { class: "two" }, left, right));

    const table = el("table");
    body.append(el("h2", { textContent: "What tells the heads apart" }), el("p", { class: "says",
      textContent: "Means over the tokens" + (map.causal ? ", the first one apart, which can only attend to itself" : "")
        + ". Entropy in bits: 0 is one token, more is spread wider. Shares are of the weight." }),
      el("div", { class: "scroll", tabIndex: 0 }, table));
    const columns = [["layer", "layer"], ["head", "head"], ["looks_at", "looks at"], ["entropy", "entropy"],
      ["distance", "distance"], ["first", "first token"], ["last", "last token"], ["previous", "previous token"],
      ["itself", "itself"], ["next", "next token"]].filter(([key]) => key in map.perHead[0]);
    let order = map.perHead.map((_, i) => i);
    const header = el("tr", {}, ...columns.map(([key, name], c) => el("th", { class: key === "looks_at" ? "text" : "" },
      el("button", { type: "button", textContent: name, title: "sort", onclick: () => {
        const value = (i) => map.perHead[i][key];
        const sign = c < 2 ? 1 : -1;
        order = [...order].sort((a, b) => (typeof value(a) === "string" ? value(a).localeCompare(value(b)) : sign * (value(a) - value(b))));
        fillTable();
      } }))));
    header.append(el("th", { class: "text", textContent: "from the chosen token" }));
    const tbody = el("tbody");
    table.append(el("thead", {}, header), tbody);
    function fillTable() {
      tbody.replaceChildren(...order.map((i) => {
        const [l, n] = [Math.floor(i / map.N), i % map.N];
        const entry = map.perHead[i];
        const row = el("tr", { class: "choosable" + (l === state.layer && n === state.head ? " chosen" : ""),
          onclick: () => { state.layer = l; state.head = n; refresh(); } });
        for (const [key] of columns) {
          const value = entry[key];
          const text = typeof value === "string" ? value : ["layer", "head"].includes(key) ? value
            : ["entropy", "distance"].includes(key) ? show(value) : percent(value);
          row.append(el("td", { class: key === "looks_at" ? "text" : "", textContent: text }));
        }
        const best = bestOf(l, n, Math.min(state.token, map.T - 1), false)[0];
        row.append(el("td", { class: "text mono", textContent: `${map.keys[best.at].label} ${percent(best.weight)}` }));
        return row;
      }));
    }
    function bestOf(l, n, token, backwards) {
      const found = [];
      for (let i = 0; i < (backwards ? map.T : map.S); i++) {
        found.push({ at: i, weight: backwards ? map.weight(l, n, i, token) : map.weight(l, n, token, i) });
      }
      return found.sort((a, b) => b.weight - a.weight);
    }
    function fill(canvas, l, n) {
      const from = (l * map.N + n) * map.T * map.S;
      shadePicture(canvas, (i) => shadeOf(map.values[from + i]));
    }
    // The chosen map with its tokens written along the sides, where there is room.
    let frame = { margin: 0, cell: 1 };
    function drawBig() {
      const width = big.clientWidth;
      let margin = 76;
      let cell = (width - margin) / map.S;
      const named = cell >= 9 && map.T * cell < 1200;
      if (!named) { margin = 0; cell = width / map.S; }
      const { pen } = canvasOf(big, margin + map.T * cell);
      frame = { margin, cell };
      pen.imageSmoothingEnabled = false;
      pen.drawImage(pictures[state.layer * map.N + state.head], margin, margin, map.S * cell, map.T * cell);
      const looks = state.looks ?? { token: state.token, backwards: !cross && state.backwards };
      pen.strokeStyle = css("--accent");
      pen.lineWidth = 1.5;
      if (looks.backwards) pen.strokeRect(margin + looks.token * cell, margin, cell, map.T * cell);
      else pen.strokeRect(margin, margin + looks.token * cell, map.S * cell, cell);
      pen.strokeStyle = css("--line");
      pen.lineWidth = 1;
      pen.strokeRect(margin, margin, map.S * cell - 0.5, map.T * cell - 0.5);
      if (!named) return;
      pen.fillStyle = css("--ink");
      pen.font = `${Math.min(12, cell)}px ui-monospace, Menlo, Consolas, monospace`;
      pen.textBaseline = "middle";
      pen.textAlign = "right";
      map.queries.forEach((piece, t) => pen.fillText(piece.label.slice(0, 10), margin - 5, margin + (t + 0.5) * cell, margin - 8));
      pen.textAlign = "left";
      map.keys.forEach((piece, s) => {
        pen.save();
        pen.translate(margin + (s + 0.5) * cell, margin - 5);
        pen.rotate(-Math.PI / 2);
        pen.fillText(piece.label.slice(0, 10), 0, 0, margin - 8);
        pen.restore();
      });
    }
    big.addEventListener("pointermove", (event) => {
      const box = big.getBoundingClientRect();
      const s = Math.floor((event.clientX - box.left - frame.margin) / frame.cell);
      const t = Math.floor((event.clientY - box.top - frame.margin) / frame.cell);
      if (s < 0 || t < 0 || s >= map.S || t >= map.T) { hideTip(); return; }
      showTip(event, `${map.queries[t].label} (${t}) → ${map.keys[s].label} (${s})\n${percent(map.weight(state.layer, state.head, t, s))}`);
    });
    big.addEventListener("pointerleave", () => { hideTip(); });
    big.addEventListener("click", (event) => {
      const t = Math.floor((event.clientY - big.getBoundingClientRect().top - frame.margin) / frame.cell);
      if (t >= 0 && t < map.T) stay(t, false);
    });

    function look(token, onKeys) {
      state.looks = { token, backwards: cross ? onKeys : state.backwards };
      shadeTokens();
    }
    function stay(token, onKeys) {
      if (!onKeys) state.token = token;
      state.looks = { token, backwards: cross ? onKeys : state.backwards };
      if (!onKeys) state.looks = null;
      refresh();
    }
    function back() { state.looks = null; shadeTokens(); }
    function shadeTokens() {
      const looks = state.looks ?? { token: state.token, backwards: !cross && state.backwards };
      const [own, others] = looks.backwards ? [keys, queries] : [queries, keys];
      const count = looks.backwards ? map.T : map.S;
      for (const group of new Set([queries, keys])) {
        group.tokens.forEach((token) => { token.style.background = ""; token.style.color = ""; token.classList.remove("chosen"); });
      }
      for (let i = 0; i < count; i++) {
        const w = looks.backwards ? map.weight(state.layer, state.head, i, looks.token) : map.weight(state.layer, state.head, looks.token, i);
        paint(others.tokens[i], shadeOf(Math.min(1, w)));
      }
      own.tokens[looks.token].classList.add("chosen");
      const pieces = looks.backwards ? map.queries : map.keys;
      const name = (looks.backwards ? map.keys : map.queries)[looks.token].label;
      const best = bestOf(state.layer, state.head, looks.token, looks.backwards).slice(0, 6);
      list.replaceChildren(el("p", { class: "note" }, el("b", { class: "mono", textContent: name }),
        ` (${looks.token}) ${looks.backwards ? "is attended to by" : "attends to"}`),
        bars(best.map((b) => [`${pieces[b.at].label} (${b.at})`, Math.min(1, b.weight), percent(b.weight)])));
      drawBig();
    }
    function refresh() {
      buttons.forEach((button, i) => {
        const on = i === state.layer * map.N + state.head;
        button.setAttribute("aria-pressed", String(on));
        button.tabIndex = on ? 0 : -1;
      });
      const entry = map.perHead[state.layer * map.N + state.head];
      const kind = map.layer_kinds[state.layer];
      title.textContent = `Layer ${entry.layer}, head ${entry.head}${kind ? ` (${kind})` : ""}`;
      facts.textContent = `Looks at ${entry.looks_at}. Entropy ${show(entry.entropy)} bits, as of ${show(2 ** entry.entropy)} tokens evenly`
        + (entry.distance === undefined ? "." : `; ${show(entry.distance)} tokens away in the mean.`);
      shadeTokens();
      fillTable();
    }
    drawn(refresh);
  }
  build();
}
