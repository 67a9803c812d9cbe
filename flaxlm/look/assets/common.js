"use strict";
// What all pages share. Text is only ever set as text: a token may spell anything.

function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// -- Numbers ---------------------------------------------------------------------------

async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.deflated), (c) => c.charCodeAt(0));
  const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(inflated).arrayBuffer();
  if (packed.type === "float32") {
    const view = new DataView(buffer);
    const values = new Float32Array(buffer.byteLength / 4);
    for (let i = 0; i < values.length; i++) values[i] = view.getFloat32(4 * i, true);
    return { shape: packed.shape, values };
  }
  const bytes16 = new Uint8Array(buffer); // the lower bytes of all, then the upper ones
  const values = new Float32Array(buffer.byteLength / 2);
  for (let i = 0; i < values.length; i++) values[i] = (bytes16[i] + 256 * bytes16[values.length + i]) / packed.steps;
  return { shape: packed.shape, values };
}

function show(x, digits = 3) {
  if (x === null || x === undefined) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e5) return Math.round(x).toLocaleString("en");
  if (size < 1e-3) return x.toExponential(1);
  return String(Number(x.toPrecision(digits)));
}

function percent(x) {
  if (x === 0) return "0";
  return x < 0.00095 ? "<0.1%" : `${(100 * x).toFixed(x < 0.0995 ? 1 : 0)}%`;
}

// -- Colours ---------------------------------------------------------------------------

const darkness = matchMedia("(prefers-color-scheme: dark)");
const redraws = [];
function drawn(draw) { // now, and again when the light changes
  redraws.push(draw);
  draw();
}
darkness.addEventListener("change", () => redraws.forEach((draw) => draw()));
let resizing = 0;
addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(() => redraws.forEach((draw) => draw()), 100);
});

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function rgb(name) {
  const hex = css(name);
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

function shades() { // 0..1 to a colour; below 0 another hue
  const [low, high, minus] = ["--low", "--high", "--minus"].map(rgb);
  return (x) => {
    const end = x < 0 ? minus : high;
    const share = Math.min(1, Math.abs(x));
    return low.map((c, i) => Math.round(c + share * (end[i] - c)));
  };
}

function shadePicture(canvas, shadeAt) { // a pixel a cell, of numbers from -1 to 1
  const pen = canvas.getContext("2d");
  const image = pen.createImageData(canvas.width, canvas.height);
  const shade = shades();
  const table = Array.from({ length: 511 }, (_, i) => shade((i - 255) / 255));
  for (let i = 0; i < canvas.width * canvas.height; i++) {
    const colour = table[Math.round(255 * Math.max(-1, Math.min(1, shadeAt(i)))) + 255];
    image.data[4 * i] = colour[0];
    image.data[4 * i + 1] = colour[1];
    image.data[4 * i + 2] = colour[2];
    image.data[4 * i + 3] = 255;
  }
  pen.putImageData(image, 0, 0);
}

function paint(element, share) { // a token's background, and ink that can be read on it
  const colour = shades()(share);
  element.style.background = `rgb(${colour})`;
  element.style.color = share > 0.55 ? css("--on-high") : css("--ink");
}

function colourOf(number) {
  return css(`--c${number % 8}`);
}

// -- What follows the pointer ------------------------------------------------------------

const tip = el("div", { id: "tip", hidden: true });
function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, innerWidth - box.width - 6);
  const below = event.clientY + 18;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${below + box.height > innerHeight ? event.clientY - box.height - 10 : below}px`;
}
function hideTip() { tip.hidden = true; }

// -- Parts -----------------------------------------------------------------------------

function figure(value, name) {
  return el("div", {}, el("b", { textContent: value }), el("span", { textContent: name }));
}

function choice(name, options, chosen, onChoose) { // a row of buttons, one of them pressed
  const bar = el("div", { class: "bar", role: "group", "aria-label": name });
  const buttons = options.map((option, number) => el("button", {
    type: "button", textContent: option, "aria-pressed": String(number === chosen),
    onclick: () => {
      buttons.forEach((b, n) => b.setAttribute("aria-pressed", String(n === number)));
      onChoose(number);
    },
  }));
  bar.append(el("span", { class: "note", textContent: name }), ...buttons);
  return bar;
}

// Tokens as buttons in a row: the pointer looks, a click stays, arrow keys walk.
function strip(pieces, name, onLook, onStay) {
  const box = el("div", { class: "strip", role: "group", "aria-label": name });
  const tokens = pieces.map((piece, number) => el("button", {
    type: "button", class: piece.special ? "token special" : "token", tabIndex: number ? -1 : 0,
    textContent: piece.label,
    onpointerenter: () => onLook(number),
    onfocus: () => onLook(number),
    onclick: () => onStay(number),
  }));
  tokens.forEach((token, number) => {
    box.append(token);
    if (pieces[number].label.includes("↵")) box.append(el("span", { class: "break" }));
  });
  box.addEventListener("keydown", (event) => {
    const at = tokens.indexOf(document.activeElement);
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 8, ArrowUp: -8 }[event.key];
    if (at < 0 || (!step && event.key !== "Home" && event.key !== "End")) return;
    event.preventDefault();
    let to = step ? at + step : event.key === "Home" ? 0 : tokens.length - 1;
    to = Math.max(0, Math.min(tokens.length - 1, to));
    tokens[at].tabIndex = -1;
    tokens[to].tabIndex = 0;
    tokens[to].focus();
  });
  return { box, tokens };
}

function bars(rows) { // [label, share, text]
  const box = el("div", { class: "bars" });
  for (const [label, share, text] of rows) {
    const meter = el("span", { class: "meter" });
    meter.style.width = `${Math.max(0, Math.min(100, 100 * share))}%`;
    box.append(el("span", { class: "mono", textContent: label }),
      el("span", { class: "number", textContent: text }), el("span", {}, meter));
  }
  return box;
}

function canvasOf(box, height) { // sharp on every screen; coordinates in CSS pixels
  const canvas = box.tagName === "CANVAS" ? box : box.querySelector("canvas");
  const width = canvas.clientWidth;
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  return { pen, width, height };
}
