async function drawView(view, page) {
  const { figures } = view;
  const tokens = figures.tokens;
  const asked = tokens.some((token) => token.best);
  const top = el("div", { class: "figures" }, figure(figures.num_tokens, "tokens"),
    figure(figures.num_bytes, "bytes"), figure(show(figures.bytes_per_token), "bytes per token"));
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
    drawn(() => source.tokens.forEach((token, n) => cut(token, n)));
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
  if (asked) {
    const scale = el("div", { class: "scale" });
    drawn(() => { scale.style.background = `linear-gradient(90deg, ${css("--low")}, ${css("--high")})`; });
    page.append(el("div", { class: "bar note" }, "expected", scale, "surprising (16 bits or more)"));
  }
  const panel = el("div", { class: "panel", "aria-live": "polite" });
  page.append(panel);

  function cut(element, n) {
    element.style.background = `color-mix(in srgb, ${colourOf(n)} 26%, ${css("--paper")})`;
    element.style.color = css("--ink");
  }
  function colour() {
    text.tokens.forEach((element, n) => {
      const bits = all[n].bits;
      if (way === "surprise" && bits !== undefined) paint(element, Math.min(1, bits / 16));
      else if (way === "cuts only" || (way !== "surprise" && all[n].loss)) cut(element, n);
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
      parts.push(el("p", { textContent: `probability ${percent(token.chance)}, ${show(token.bits)} bits of surprise, `
        + `rank ${token.rank.toLocaleString("en")}` }));
    } else if (!token.best && asked) {
      parts.push(el("p", { class: "note", textContent: "The model was not asked for this token." }));
    }
    if (token.best) {
      parts.push(el("p", { class: "note", textContent: `The likeliest here (entropy ${show(token.entropy)} bits):` }),
        bars(token.best.map((b) => [b.id === token.id && !token.after ? `${b.label} ✓` : b.label, b.chance, percent(b.chance)])));
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
