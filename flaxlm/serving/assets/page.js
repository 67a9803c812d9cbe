// A conversation with the model of this server, and nothing else: no library, no other host.
"use strict";

const at = (id) => document.getElementById(id);
let model = null;      // as /v1/models describes it
let messages = [];     // of the conversation
let running = null;    // what stops the answer that is being written

const headers = () => {
  const key = at("key").value.trim();
  return {"Content-Type": "application/json", ...(key && {Authorization: `Bearer ${key}`})};
};

function show(role, text) {
  const turn = document.createElement("div");
  turn.className = `turn ${role}`;
  turn.textContent = text;
  at("talk").append(turn);
  turn.scrollIntoView({block: "end"});
  return turn;
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answers ${response.status}`;
  }
}

async function describe() {
  const response = await fetch("v1/models", {headers: headers()});
  if (!response.ok) throw new Error(await failure(response));
  model = (await response.json()).data[0];
  at("model").textContent = model.id;
  document.title = model.id;
  at("state").textContent = chats() ? "" :
    model.endpoints.includes("completions") ? "no chat template: your text is continued" :
    "this model writes no text: ask /v1/embeddings";
}

const chats = () => model.endpoints.includes("chat/completions");

// The events of a response, as objects.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) throw new Error("the server has ended the answer");
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const found = JSON.parse(data);
      if (found.error) throw new Error(found.error.message);
      yield found;
    }
  }
}

function request(text) {
  const asked = {
    model: model.id, stream: true,
    temperature: Number(at("temperature").value), max_tokens: Number(at("tokens").value),
  };
  if (!chats()) return ["v1/completions", {...asked, prompt: text}];
  const system = at("system").value.trim();
  const first = system ? [{role: "system", content: system}] : [];
  return ["v1/chat/completions", {...asked, messages: [...first, ...messages]}];
}

async function send() {
  const text = at("text").value;
  if (running || !text.trim()) return;
  running = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  let turn = null, written = "";
  try {
    if (!model) await describe();
    at("text").value = "";
    show("user", text);
    messages.push({role: "user", content: text});
    turn = show("assistant", "");
    const [path, body] = request(text);
    const response = await fetch(path, {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response)) {
      const choice = event.choices[0];
      written += (choice.delta ? choice.delta.content : choice.text) || "";
      turn.textContent = written;
      turn.scrollIntoView({block: "end"});
    }
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
  }
  if (turn) messages.push({role: "assistant", content: written});
  running = null;
  at("send").disabled = false;
  at("stop").disabled = true;
}

at("send").addEventListener("click", send);
at("stop").addEventListener("click", () => running && running.abort());
at("clear").addEventListener("click", () => {
  if (running) running.abort();
  messages = [];
  at("talk").replaceChildren();
});
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
at("key").addEventListener("change", () => describe().catch(() => {}));
describe().catch((error) => { at("state").textContent = error.message; });
