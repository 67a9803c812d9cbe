async function drawView(view, page) {
  if (view.figures.sides) drawBeside(view.figures, page);
  else drawText(view.figures, page);
}

function drawText(figures, page) {
  const tokens = figures.tokens;
  const asked = tokens.some((token) => token.best);
  const top = el("div", { class: "figures" }, figure(figures.num_tokens, "tokens"),
    figure(figures.num_bytes, "bytes"), figure(show(figures.bytes_per_token), "bytes per token"), figure(show(figures.tokens_per_word), "tokens per word"));
  if (figures.bits !== undefined) {
    top.append(figure(show(figures.bits), "bits of surprise"), figure(show(figures.bits_per_token), "bits per token"),
      figure(show(figures.bits_per_byte), "bits per byte"), figure(show(figures.perplexity), "perplexity"));
  }
  const taught = figures.num_learnt !== undefined;
  if (taught) top.append(figure(figures.num_learnt, "tokens carry loss"), figure(show(figures.loss), "nats per such token"));
  page.append(top);

  if (figures.source.length) {
    page.append(el("h2", { textContent: "The source" }));
    const source = strip(figures.source, "source tokens", () => {}, () => {});
    drawn(() => source.tokens.forEach((token, n) => cutColour(token, n)));
    page.append(source.box);
  }
  page.append(el("h2", { textContent: "The text" }));
  const ways = [...(taught ? ["what carries loss"] : []), ...(asked ? ["surprise"] : []), "cuts only"];
  let way = ways[0];
  if (ways.length > 1) page.append(choice("colour", ways, 0, (n) => { way = ways[n]; colour(); }));
  const all = figures.after ? [...tokens, { ...figures.after, label: "…?", special: true, after: true }] : tokens;
  let stays = 0;
  const text = strip(all, "tokens of the text", (n) => tell(n), (n) => { stays = n; tell(n); });
  text.box.addEventListener("pointerleave", () => tell(stays));
  page.append(text.box);
  if (asked) page.append(surpriseScale());
  const panel = el("div", { class: "panel", "aria-live": "polite" });
  page.append(panel);

  function colour() {
    text.tokens.forEach((element, n) => {
      const bits = all[n].bits;
      if (way === "surprise" && bits !== undefined) paint(element, Math.min(1, bits / 16));
      else if (way === "cuts only" || (way !== "surprise" && all[n].loss)) cutColour(element, n);
      else { element.style.background = ""; element.style.color = ""; }
    });
  }
  function tell(n) {
    const token = all[n];
    text.tokens.forEach((element, m) => element.classList.toggle("chosen", m === n));
    const facts = [];
    if (!token.after) {
      facts.push(`token ${n}`, `id ${token.id}`);
      if (token.hex) facts.push(`bytes ${token.hex}`);
      if (taught) facts.push(token.loss ? "carries loss" : "carries no loss");
      if (token.name && token.name !== token.label) facts.push(`in the vocabulary: ${token.name}`);
    }
    const parts = [el("p", {}, el("b", { class: "mono", textContent: token.after ? "what would come next" : token.label })),
      el("p", { class: "note mono", textContent: facts.join(" · ") })];
    if (token.bits !== undefined) {
      parts.push(el("p", { textContent: surpriseOf(token) }));
    } else if (!token.best && asked) {
      parts.push(el("p", { class: "note", textContent: "The model was not asked for this token." }));
    }
    if (token.best) {
      parts.push(...likeliest(token));
    }
    panel.replaceChildren(...parts);
  }
  drawn(colour);
  stays = tokens.findIndex((token) => token.best);
  if (stays < 0) stays = 0;
  tell(stays);

  page.append(el("h2", { textContent: "All tokens" }));
  const columns = asked ? ["#", "token", "id", "bytes", "probability", "bits", "rank"] : ["#", "token", "id", "bytes"];
  const rows = tokens.map((token, n) => el("tr", {}, ...[n, token.label, token.id, token.hex]
    .map((value, i) => el("td", { class: i === 1 || i === 3 ? "text mono" : "", textContent: value })),
    ...(asked ? [token.bits === undefined ? "" : percent(token.chance), token.bits === undefined ? "" : show(token.bits), token.rank ?? ""]
      .map((value) => el("td", { textContent: value })) : [])));
  page.append(el("div", { class: "scroll", tabIndex: 0 }, el("table", {}, el("thead", {}, el("tr", {},
    ...columns.map((name, i) => el("th", { class: i === 1 || i === 3 ? "text" : "", textContent: name })))), el("tbody", {}, ...rows))));
}

function cutColour(element, n) {
  element.style.background = `color-mix(in srgb, ${colourOf(n)} 26%, ${css("--paper")})`;
  element.style.color = css("--ink");
}

function surpriseOf(token) {
  return `probability ${percent(token.chance)}, ${show(token.bits)} bits of surprise, rank ${token.rank.toLocaleString("en")}`;
}

function likeliest(token) {
  return [el("p", { class: "note", textContent: `The likeliest here (entropy ${show(token.entropy)} bits):` }),
    bars(token.best.map((b) => [b.id === token.id && !token.after ? `${b.label} ✓` : b.label, b.chance, percent(b.chance)]))];
}

function surpriseScale() {
  const scale = el("div", { class: "scale" });
  drawn(() => { scale.style.background = `linear-gradient(90deg, ${css("--low")}, ${css("--high")})`; });
  return el("div", { class: "bar note" }, "expected", scale, "surprising (16 bits or more)");
}

// -- Two side by side --------------------------------------------------------------------

function drawBeside({ sides, words }, page) {
  const rows = [["num_tokens", "tokens"], ["tokens_per_word", "tokens per word"], ["bytes_per_token", "bytes per token"],
    ["bits", "bits of surprise"], ["bits_per_byte", "bits per byte"], ["bits_per_token", "bits per token"],
    ["perplexity", "perplexity of a token"]].filter(([key]) => sides.some((side) => side[key] !== undefined));
  page.append(el("div", { class: "scroll", tabIndex: 0 }, el("table", {}, el("thead", {}, el("tr", {},
    el("th", { class: "text" }), ...sides.map((side) => el("th", { textContent: side.name })))), el("tbody", {},
    ...rows.map(([key, name]) => el("tr", {}, el("td", { class: "text", textContent: name }),
      ...sides.map((side) => el("td", { textContent: show(side[key], 4) }))))))));
  const asked = sides.some((side) => side.bits !== undefined);
  let way = asked ? 0 : 1;
  if (asked) {
    page.append(choice("colour", ["surprise", "cuts only"], 0, (n) => { way = n; colour(); }), surpriseScale());
  }
  const columns = sides.map((side, number) => {
    const text = strip(side.tokens, `tokens of ${side.name}`, (n) => tell(number, n), (n) => tell(number, n));
    const panel = el("div", { class: "panel", "aria-live": "polite" });
    return { side, text, panel, box: el("div", {}, el("h2", { textContent: side.name }), text.box, panel) };
  });
  page.append(el("p", { class: "note", textContent: "A token shows which tokens of the other side begin or end within it." }),
    el("div", { class: "two" }, ...columns.map((column) => column.box)));
  function colour() {
    for (const { side, text } of columns) {
      text.tokens.forEach((element, n) => {
        const { bits } = side.tokens[n];
        if (way === 0 && bits !== undefined) paint(element, Math.min(1, bits / 16));
        else if (way === 1) cutColour(element, n);
        else { element.style.background = ""; element.style.color = ""; }
      });
    }
  }
  const ends = (token) => token.at + token.hex.split(" ").filter(Boolean).length;
  function tell(number, n) { // a token of one side, and what the other makes of the same bytes
    const token = sides[number].tokens[n];
    columns.forEach(({ side, text, panel }, c) => {
      const met = side.tokens.map((other, m) => (c === number ? m === n
        : token.at !== undefined && other.at !== undefined && other.at < ends(token) && ends(other) > token.at));
      text.tokens.forEach((element, m) => element.classList.toggle("chosen", met[m]));
      const shown = side.tokens.filter((_, m) => met[m]);
      panel.replaceChildren(...(shown.length ? [] : [el("p", { class: "note", textContent: "Nothing of the same bytes." })]));
      for (const one of shown.slice(0, 4)) {
        panel.append(el("p", {}, el("b", { class: "mono", textContent: one.label }), el("span", { class: "note", textContent: ` id ${one.id}` })));
        if (one.bits !== undefined) panel.append(el("p", { textContent: surpriseOf(one) }));
        if (one.best) panel.append(...likeliest(one));
      }
      if (shown.length > 4) panel.append(el("p", { class: "note", textContent: `and ${shown.length - 4} more` }));
    });
  }
  drawn(colour);
  tell(0, Math.min(1, sides[0].tokens.length - 1));

  if (!words.some((word) => word.pieces.some((pieces) => pieces))) return;
  const tbody = el("tbody");
  const both = sides.every((side) => side.bits !== undefined);
  const orders = { "as written": () => 0, "most tokens first": (a, b) => most(b) - most(a),
    ...(both ? { "most different surprise first": (a, b) => gap(b) - gap(a) } : {}) };
  const most = (word) => Math.max(...word.pieces.map((pieces) => pieces?.length ?? 0));
  const gap = (word) => (word.bits.includes(null) ? -1 : Math.abs(word.bits[0] - word.bits[1]));
  const fill = (order) => tbody.replaceChildren(...[...words].sort(order).slice(0, 400).map((word) => el("tr", {},
    el("td", { class: "text mono", textContent: word.word }), ...sides.flatMap((side, c) => [
      el("td", { class: "text mono", textContent: word.pieces[c]?.join(" | ") ?? "–" }),
      ...(side.bits === undefined ? [] : [el("td", { textContent: show(word.bits[c]) })])]))));
  page.append(el("h2", { textContent: "Word by word" }), choice("order", Object.keys(orders), 0, (n) => fill(Object.values(orders)[n])));
  if (words.length > 400) page.append(el("p", { class: "note", textContent: `400 of ${words.length.toLocaleString("en")} words.` }));
  page.append(el("div", { class: "scroll", tabIndex: 0 }, el("table", {}, el("thead", {}, el("tr", {}, el("th", { class: "text", textContent: "word" }),
    ...sides.flatMap((side) => [el("th", { class: "text", textContent: side.name }),
      ...(side.bits === undefined ? [] : [el("th", { textContent: "bits" })])]))), tbody)));
  fill(Object.values(orders)[0]);
}
