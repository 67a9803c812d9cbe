// The story, chapter by chapter; `draw[key]` draws the figure of a chapter.
async function drawView(view, page) {
  const { tokens, source, at, steps } = view.figures;
  const isFilled = steps.some((step) => step.at !== undefined);
  const contents = el("ol", { class: "contents" });
  page.append(el("nav", { "aria-label": "chapters" }, contents));

  const draw = {
    ids(chapter, box) {
      if (source.length) box.append(note("The source, which the encoder reads:"), pieces(source, "source tokens"), note("The text:"));
      box.append(pieces(tokens, "tokens of the text"));
      if (!chapter.words.length) return;
      const list = el("div", { class: "panel scroll", tabIndex: 0, role: "region", "aria-label": "merges" });
      const pick = el("select", { "aria-label": "word", onchange: () => tell() },
        ...chapter.words.map((word, n) => el("option", { value: String(n), textContent: word[0].pieces.join("") })));
      const tell = () => list.replaceChildren(el("div", { class: "merges" }, ...chapter.words[Number(pick.value)].flatMap((state) => [
        el("span", { class: "note", textContent: state.rank === null ? "bytes" : `merge ${state.rank.toLocaleString("en")}` }),
        el("span", {}, ...state.pieces.map((piece) => el("span", { class: "token mono", textContent: piece }))),
      ])));
      const longest = chapter.words.reduce((a, word, n) => (word.length > chapter.words[a].length ? n : a), 0);
      pick.value = String(longest);
      box.append(el("label", { class: "bar" }, "How a word was merged:", pick), list);
      tell();
    },

    async vectors(chapter, box) {
      const { shape: [, D], values } = await unpack(chapter.vectors);
      const most = values.reduce((a, b) => Math.max(a, Math.abs(b)), 0) || 1;
      const panel = el("div", { class: "panel", "aria-live": "polite" });
      const canvas = el("canvas", { class: "wide stripes", width: D, height: 1, role: "img", "aria-label": "the vector" });
      const says = note("");
      const list = el("div");
      panel.append(says, canvas, list);
      let now = 0;
      const paintVector = () => shadePicture(canvas, (i) => values[now * D + i] / most);
      box.append(walk(tokens, "tokens of the text", at, (t) => {
        now = chapter.known.indexOf(tokens[t].id);
        if (now < 0) return;
        const few = [...values.slice(now * D, now * D + 4)].map((x) => show(x)).join(", ");
        says.textContent = `${tokens[t].label}, id ${tokens[t].id}: [${few}, …], ${chapter.width} numbers`
          + (D < chapter.width ? `, of which the first ${D} are drawn.` : ".");
        paintVector();
        list.replaceChildren(note("Nearest in the embedding, by cosine:"),
          bars(chapter.neighbours[now].map((one) => [one.label, one.cosine, one.cosine.toFixed(2)])));
      }), panel);
      drawn(paintVector);
    },

    async positions(chapter, box) {
      await addCharts(chapter.charts, box);
      if (!chapter.lengths) return;
      const [own, added] = await Promise.all(chapter.lengths.map(unpack));
      const rows = tokens.map((token, t) => [token.label, t, show(own.values[t]), show(added.values[t])]);
      box.append(table(["token", "position", "length of its vector", "length of what is added"], rows, 1));
    },

    async block(chapter, box) {
      const maps = await Promise.all(chapter.maps.map(async (map) => ({ ...map, ...await unpack(map.weights) })));
      const heads = await unpack(chapter.heads); // (T, N)
      const scores = await unpack(chapter.scores); // (N, T) of the asked place
      const shares = chapter.experts && await unpack(chapter.experts.shares);
      const [T, N] = heads.shape;
      const state = { map: maps.length - 1, head: 0, token: at };
      const weight = (t, s) => {
        const { shape: [, rows, S], values } = maps[state.map];
        return values[(state.head * rows + t) * S + s];
      };
      if (maps.length > 1) box.append(choice("looks at", maps.map((map) => map.name), state.map, (n) => { state.map = n; tell(); }));
      box.append(choice("head", Array.from({ length: N }, (_, n) => String(n)), 0, (n) => { state.head = n; tell(); }));
      const canvas = el("canvas", { class: "wide map", role: "img" });
      const seen = el("div");
      const mix = el("div");
      const inner = el("div");
      const strip_ = walk(tokens, "tokens of the text", at, (t) => { state.token = t; tell(); });
      box.append(note("Choose a token that asks:"), strip_, el("div", { class: "two" },
        el("div", {}, canvas, note("One head's map. Down: the token that asks; across: the tokens that it looks at; the stronger the colour, the more weight. The outlined row is the chosen one.")),
        el("div", { class: "panel", "aria-live": "polite" }, seen, mix, inner)));
      function paintMap() {
        const map = maps[state.map];
        const S = map.shape[2];
        const small = el("canvas", { width: S, height: T });
        shadePicture(small, (i) => Math.sqrt(map.values[state.head * T * S + i]));
        const cell = Math.min(canvas.clientWidth / S, 36);
        const { pen } = canvasOf(canvas, Math.max(14, cell * T));
        pen.imageSmoothingEnabled = false;
        pen.drawImage(small, 0, 0, cell * S, cell * T);
        pen.strokeStyle = css("--minus");
        pen.lineWidth = 2;
        pen.strokeRect(1, state.token * cell + 1, Math.max(2, cell * S - 2), Math.max(2, cell - 2));
        pen.strokeStyle = css("--line");
        pen.lineWidth = 1;
        pen.strokeRect(0.5, 0.5, cell * S - 1, cell * T - 1);
      }
      function tell() {
        const map = maps[state.map];
        const keys = map.cross ? source : tokens;
        canvas.setAttribute("aria-label", `attention of head ${state.head}`);
        const best = keys.map((key, s) => [s, weight(state.token, s)]).sort((a, b) => b[1] - a[1]).slice(0, 6);
        const withScore = !map.cross && state.token === at;
        seen.replaceChildren(note(`${tokens[state.token].label} (${state.token}), head ${state.head}, looks at:`),
          bars(best.map(([s, w]) => [`${keys[s].label} (${s})`, w,
            percent(w) + (withScore ? ` · q·k ${show(scores.values[state.head * T + s])}` : "")])));
        const own = Array.from({ length: N }, (_, n) => heads.values[state.token * N + n]);
        const most = Math.max(...own) || 1;
        mix.replaceChildren(note("How much each head adds to this token (length of its vector):"),
          bars(own.map((x, n) => [`head ${n}`, x / most, show(x)])));
        if (chapter.neurons) {
          const few = chapter.neurons[state.token];
          const top = Math.abs(few[0].value) || 1;
          inner.replaceChildren(note("Its strongest neurons, and where in the text each is strongest:"),
            bars(few.map((one) => [`neuron ${one.neuron}, most at “${tokens[one.peak].label}” (${one.peak})`, Math.abs(one.value) / top, show(one.value)])));
        }
        paintMap();
      }
      drawn(tell);
      if (!chapter.experts) return;
      const A = shares.shape[2];
      const rows = tokens.map((token, t) => [token.label, t, ...chapter.experts.ids.map((layer, l) => layer[t]
        .map((id, a) => `${id} ${percent(shares.values[(l * T + t) * A + a])}`).join(", "))]);
      box.append(note(`Which of the ${chapter.experts.count} experts each token is sent to, and with what weight:`),
        table(["token", "position", ...chapter.experts.ids.map((_, l) => `layer ${l}`)], rows, 1));
    },

    async state(chapter, box) {
      await addCharts(chapter.charts, box);
      const { values } = await unpack(chapter.changes);
      const most = Math.max(...values) || 1;
      box.append(el("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": "changes of the state" },
        bars(tokens.map((token, t) => [`${token.label} (${t})`, values[t] / most, show(values[t])]))));
    },

    async lens(chapter, box) {
      const { shape: [L, T, X], values } = await unpack(chapter.chances);
      const body = el("div", { "aria-live": "polite" });
      box.append(note("Choose a token:"), walk(tokens, "tokens of the text", at, (t) => {
        const rows = Array.from({ length: L }, (_, l) => [l ? `after layer ${l - 1}` : "before any layer",
          ...Array.from({ length: X }, (_, x) => `${chapter.labels[chapter.ids[l][t][x]]}  ${percent(values[(l * T + t) * X + x])}`)]);
        body.replaceChildren(table(["", "likeliest", ...["second", "third"].slice(0, X - 1)], rows, X + 1));
      }), body);
    },

    async softmax(chapter, box) {
      const { values } = await unpack(chapter.logits);
      const order = [...values.keys()].sort((a, b) => values[b] - values[a]);
      const controls = [["temperature", 1, 0.05, 3, 0.05], ["top-k", values.length, 1, Math.min(values.length, 40), 1], ["top-p", 1, 0.05, 1, 0.01]];
      const [heat, topK, topP] = controls.map(([name, , low, high, step]) => {
        const range = el("input", { type: "range", min: low, max: high, step, "aria-label": name, oninput: () => tell() });
        range.value = name === "top-k" ? high : 1;
        const out = el("output");
        box.append(el("label", { class: "slider" }, el("span", { textContent: name }), range, out));
        return { range, out };
      });
      const body = el("div", { class: "panel", id: "softmax" });
      const says = el("p", { class: "note", "aria-live": "polite" });
      box.append(body, says);
      function tell() {
        const T = Number(heat.range.value);
        const most = values[order[0]];
        const powers = order.map((id) => Math.exp((values[id] - most) / T));
        const sum = powers.reduce((a, b) => a + b, 0);
        const chances = powers.map((x) => x / sum);
        const cut = Number(topK.range.value) < Number(topK.range.max);
        const k = cut ? Number(topK.range.value) : values.length;
        // Top-p looks at what top-k has left, as in `flaxlm infer`.
        const left = chances.slice(0, k).reduce((a, b) => a + b, 0);
        let [kept, mass] = [0, 0];
        while (kept < k && (kept === 0 || mass < Number(topP.range.value) * left - 1e-12)) mass += chances[kept++];
        if (Number(topP.range.value) === 1) { kept = k; mass = left; }
        heat.out.textContent = T.toFixed(2);
        topK.out.textContent = cut ? String(k) : "all";
        topP.out.textContent = Number(topP.range.value).toFixed(2);
        const few = chapter.labels.slice(0, 12);
        const list = bars(few.map((label, n) => [label, chances[n] / fullBar(chances[0]), `${percent(chances[n])} · logit ${show(values[order[n]])}`]));
        few.forEach((_, n) => { for (let i = 0; i < 3; i++) list.children[3 * n + i].classList.toggle("out", n >= kept); });
        body.replaceChildren(list);
        const bits = chances.reduce((a, p) => a - (p > 0 ? p * Math.log2(p) : 0), 0);
        says.textContent = `${kept.toLocaleString("en")} of ${values.length.toLocaleString("en")} tokens can be drawn; `
          + `before the cut they have ${percent(mass)} of the probability. Entropy: ${show(bits)} bits, as if ${show(2 ** bits)} tokens were equally likely.`;
        body.dataset.best = chances[0].toPrecision(9);
        body.dataset.kept = String(kept);
      }
      tell();
    },

    rounds(chapter, box) {
      if (!steps.length) { box.append(note("There is no room for another token.")); return; }
      let now = 0;
      const text = el("p", { class: "mono written", "aria-live": "polite" });
      const list = el("div", { class: "panel" });
      const back = el("button", { type: "button", textContent: "← back", onclick: () => go(now - 1) });
      const on = el("button", { type: "button", textContent: isFilled ? "fill the mask →" : "draw the token →", onclick: () => go(now + 1) });
      const count = el("span", { class: "note" });
      const start = isFilled ? tokens.length : at + 1;
      function go(to) {
        now = Math.max(0, Math.min(steps.length, to));
        const written = tokens.slice(0, start).map((token) => ({ ...token }));
        steps.slice(0, now).forEach((step) => {
          if (isFilled) written[step.at] = { ...step, isNew: true };
          else written.push({ ...step, isNew: true });
        });
        text.replaceChildren(...written.map((token) => el(token.isNew ? "mark" : "span", { textContent: token.label })));
        count.textContent = `${now} of ${steps.length}`;
        back.setAttribute("aria-disabled", String(now === 0));
        on.setAttribute("aria-disabled", String(now === steps.length));
        const next = steps[now];
        list.replaceChildren(note(next ? "What the model thinks comes here:" : "It was asked for no more."), ...(next ? [
          bars(next.best.map((one) => [one.id === next.id ? `${one.label} ✓` : one.label, one.chance / fullBar(next.best[0].chance), percent(one.chance)])),
          note(`Taken: “${next.label}”, probability ${percent(next.chance)}.`)] : []));
      }
      box.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!step) return;
        event.preventDefault();
        go(now + step);
      });
      box.append(el("div", { class: "bar" }, back, on, count), text, list);
      go(0);
    },

    cost(chapter, box) {
      const [own] = chapter.costs;
      const parts = Object.entries(own.parts).sort((a, b) => b[1] - a[1]);
      box.append(note("Parameters by part:"), bars(parts.map(([name, n]) => [name, n / own.parameters, n.toLocaleString("en")])));
      const big = (x, unit, base) => {
        if (x === null || x === undefined) return "–";
        const power = x >= 1 ? Math.min(5, Math.floor(Math.log(x) / Math.log(base) + 1e-9)) : 0;
        const letter = ["", "k", "M", "G", "T", "P"][power];
        return `${show(x / base ** power)} ${base === 1024 && power ? `${letter.toUpperCase()}i` : letter}${unit}`.trim();
      };
      const bytes = (x) => big(x, "B", 1024); // as flaxlm plan writes them
      const rows = [["parameters", (c) => big(c.parameters, "", 1000)], ["used by a token", (c) => big(c.active, "", 1000)],
        ["weights", (c) => bytes(c.weight_bytes)], ["FLOPs to read a token", (c) => big(c.flops_per_token, "", 1000)],
        ["FLOPs to learn from it", (c) => big(3 * c.flops_per_token, "", 1000)], ["FLOPs to write one, context full", (c) => big(c.flops_to_write, "", 1000)],
        ["cache for a token", (c) => bytes(c.cache_per_token)], ["context, tokens", (c) => c.context.toLocaleString("en")],
        ["cache, context full", (c) => bytes(c.cache_bytes)]];
      box.append(note("Beside larger ones:"), table(["", ...chapter.costs.map((c) => c.name)], rows.map(([name, of]) => [name, ...chapter.costs.map(of)]), 1));
    },
  };

  function fullBar(best) { return Math.max(0.25, best); } // what a bar of full width is
  function note(text) { return el("p", { class: "note", textContent: text }); }
  function pieces(some, name) { // tokens, of which the chosen one is told about
    const says = el("p", { class: "note mono", "aria-live": "polite" });
    return el("div", {}, walk(some, name, 0, (n) => {
      const one = some[n];
      says.textContent = [`token ${n}`, `id ${one.id}`, one.hex ? `bytes ${one.hex}` : "a special token"].join(" · ");
    }, true), says);
  }
  function walk(some, name, first, onChoose, colour = false) { // tokens, one of them chosen
    const choose = (n) => {
      tokens_.forEach((token, m) => {
        token.classList.toggle("chosen", m === n);
        token.setAttribute("aria-pressed", String(m === n));
      });
      onChoose(n);
    };
    const { box, tokens: tokens_ } = strip(some, name, () => {}, choose);
    tokens_.forEach((token, n) => token.addEventListener("focus", () => choose(n)));
    if (colour) drawn(() => tokens_.forEach((token, n) => { token.style.background = `color-mix(in srgb, ${colourOf(n)} 26%, ${css("--paper")})`; }));
    queueMicrotask(() => choose(first));
    return box;
  }
  function table(names, rows, texts) { // the first `texts` columns are words
    const cells = (tag, row) => row.map((value, i) => el(tag, { class: i < texts ? "text mono" : "", textContent: value }));
    return el("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": names.filter(Boolean).join(", ") }, el("table", {},
      el("thead", {}, el("tr", {}, ...cells("th", names))), el("tbody", {}, ...rows.map((row) => el("tr", {}, ...cells("td", row))))));
  }

  for (const [number, chapter] of view.data.chapters.entries()) {
    const box = el("section", { id: `chapter-${chapter.key}`, class: "chapter" },
      el("h2", { textContent: `${number + 1}. ${chapter.title}` }),
      ...chapter.says.map((text) => el("p", {}, ...text.split("`").map((part, n) => (n % 2 ? el("code", { textContent: part }) : part)))));
    contents.append(el("li", {}, el("a", { href: `#chapter-${chapter.key}`, textContent: chapter.title })));
    page.append(box);
    await draw[chapter.key](chapter, box);
  }
}
