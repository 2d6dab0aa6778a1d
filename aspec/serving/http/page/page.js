"use strict";
// The page: a chat through the server's own interface, and the lanes of the engine from /live.

const at = (id) => document.getElementById(id);
const COLORS = { disk: "disk", h2d: "link", d2h: "back-link", decode: "decode", target: "target", draft: "draft", cpu: "cpu" };
const LEVELS = 8;
const talk = []; // the messages so far
let running = null; // the AbortController of the answer that is being generated
let chats = true; // whether the model has a chat template; without one it continues a text
let key = sessionStorage.getItem("key") || "";

function headers() {
  return key ? { "content-type": "application/json", authorization: `Bearer ${key}` } : { "content-type": "application/json" };
}

function made(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

// -- server-sent events -------------------------------------------------------------------------------------

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part.startsWith(": ")) yield { comment: part.slice(2) };
      const line = part.split("\n").find((one) => one.startsWith("data: "));
      if (line && line !== "data: [DONE]") yield { data: JSON.parse(line.slice(6)) };
    }
  }
}

async function problem(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

function askForKey() {
  return new Promise((resolve) => {
    const lock = at("lock");
    if (!lock.open) lock.showModal();
    lock.addEventListener("close", () => {
      key = at("key").value;
      sessionStorage.setItem("key", key);
      resolve();
    }, { once: true });
  });
}

// -- chat ---------------------------------------------------------------------------------------------------

function addMessage(role, text) {
  const message = made("div", `message ${role}`);
  message.append(made("span", "who", role === "user" ? "You" : "Model"));
  const body = made("span", "body", text);
  message.append(body);
  at("log").append(message);
  scroll();
  return body;
}

function addNote(text, className) {
  at("log").append(made("p", `note ${className || ""}`, text));
  scroll();
}

function scroll() {
  at("log").scrollTop = at("log").scrollHeight;
}

function setRunning(controller) {
  running = controller;
  at("stop").disabled = !controller;
  at("send").disabled = Boolean(controller);
  at("log").setAttribute("aria-busy", String(Boolean(controller))); // read aloud when it is complete
}

function request() {
  const body = { stream: true, stream_options: { include_usage: true, include_drafted: true } };
  if (at("temperature").value) body.temperature = Number(at("temperature").value);
  if (at("tokens").value) body.max_tokens = Number(at("tokens").value);
  if (chats) return ["v1/chat/completions", { ...body, messages: talk }];
  return ["v1/completions", { ...body, prompt: talk[talk.length - 1].content }];
}

async function answer() {
  const controller = new AbortController();
  setRunning(controller);
  const begun = performance.now();
  const seen = { text: "", drafted: 0, tokens: 0, first: 0, reason: "" };
  const body = addMessage("assistant", "");
  try {
    at("status").textContent = "waiting for the server";
    const [path, asked] = request();
    const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(asked), signal: controller.signal });
    if (response.status === 401) {
      await askForKey();
      body.parentElement.remove();
      return answer();
    }
    if (!response.ok) throw new Error(await problem(response));
    for await (const event of events(response)) take(event, body, seen, begun);
  } catch (error) {
    if (error.name === "AbortError") seen.reason = "stopped";
    else addNote(error.message, "error");
  } finally {
    setRunning(null);
    at("status").textContent = "";
  }
  finish(body, seen, begun);
}

function take(event, body, seen, begun) {
  if (event.comment) at("status").textContent = event.comment;
  if (!event.data) return;
  if (event.data.error) throw new Error(event.data.error.message);
  if (event.data.usage) seen.tokens = event.data.usage.completion_tokens;
  const choice = event.data.choices[0];
  if (!choice) return;
  seen.reason = choice.finish_reason || seen.reason;
  const text = choice.text ?? choice.delta.content ?? "";
  if (!text) return;
  if (!seen.text) seen.first = performance.now() - begun;
  const drafted = text.slice(0, choice.drafted || 0), sampled = text.slice(drafted.length);
  if (drafted) body.append(made("span", "drafted", drafted));
  if (sampled) body.append(made("span", "sampled", sampled));
  seen.text += text;
  seen.drafted += drafted.length;
  at("status").textContent = "generating";
  scroll();
}

function finish(body, seen, begun) {
  if (!seen.text) {
    if (seen.reason !== "stopped") body.parentElement.remove();
    else addNote("stopped before the first word");
    talk.pop(); // the message is asked again
    return;
  }
  talk.push({ role: "assistant", content: seen.text });
  const seconds = (performance.now() - begun) / 1000;
  const facts = [seen.reason === "stop" ? "complete" : seen.reason === "length" ? "cut at its length" : seen.reason || "broken off"];
  if (seen.tokens) facts.push(`${seen.tokens} tokens`, `${(seen.tokens / seconds).toFixed(2)} tokens/s`);
  facts.push(`first word after ${(seen.first / 1000).toFixed(1)} s`, `${Math.round((100 * seen.drafted) / seen.text.length)} % drafted`);
  addNote(facts.join(" · "));
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("text").value.trim();
  if (!text || running) return;
  at("text").value = "";
  talk.push({ role: "user", content: text });
  addMessage("user", text);
  answer();
});

at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});

const stop = () => running && running.abort();
at("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
at("new").addEventListener("click", () => {
  stop();
  talk.length = 0;
  at("log").replaceChildren();
  at("text").focus();
});

// -- what the machine does ----------------------------------------------------------------------------------

function show(state) {
  chats = state.chats || state.state !== "ready";
  at("text-label").textContent = chats ? "Message" : "Text to continue (this model has no chat template)";
  at("model").textContent = state.state === "ready" ? state.model : `${state.model}: ${state.reason || state.state}`;
  at("speed").textContent = state.open && state.tokens_per_s ? state.tokens_per_s.toFixed(2) : "–";
  at("per-pass").textContent = state.tokens_per_pass ? state.tokens_per_pass.toFixed(2) : "–";
  at("open").textContent = `${state.open} / ${state.rows}`;
  const hidden = state.hidden === null ? "" : ` · compute beside the stream: ${Math.round(100 * state.hidden)} %`;
  at("bottleneck").textContent = state.open ? state.bottleneck + hidden : "idle";
  at("span").textContent = `the last ${state.seconds.toFixed(0)} seconds`;
  at("memory").textContent = state.memory;
  showLanes(state.lanes);
  showCells(state);
}

function showLanes(lanes) {
  const box = at("lanes");
  const names = lanes.map((lane) => lane.name).join();
  if (box.dataset.names !== names) {
    box.dataset.names = names;
    box.replaceChildren(...lanes.map((lane) => {
      const row = made("div", "lane");
      row.append(made("span", "name", lane.name), made("canvas"), made("span", "share"), made("span", "rate"));
      return row;
    }));
  }
  lanes.forEach((lane, index) => {
    const row = box.children[index];
    row.querySelector(".share").textContent = `${Math.round(100 * lane.share)} %`;
    row.querySelector(".rate").textContent = lane.rate ? `${lane.rate} while busy` : "";
    draw(row.querySelector("canvas"), lane);
  });
}

function draw(canvas, lane) {
  const scale = window.devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * scale), height = Math.round(canvas.clientHeight * scale);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const style = getComputedStyle(document.documentElement), pen = canvas.getContext("2d");
  pen.clearRect(0, 0, width, height);
  pen.fillStyle = style.getPropertyValue("--line");
  pen.fillRect(0, height - 1, width, 1);
  pen.fillStyle = style.getPropertyValue(`--${COLORS[lane.name] || "cpu"}`);
  const each = width / lane.cells.length;
  lane.cells.forEach((level, index) => {
    if (level) pen.fillRect(index * each, height * (1 - level / LEVELS), Math.ceil(each), height * (level / LEVELS));
  });
}

function showCells(state) {
  const whole = state.layers.filter((share) => share >= 1).length;
  fill("layers", state.layers, (cell, share) => cell.style.setProperty("--share", `${Math.round(100 * share)}%`));
  at("layers-words").textContent = `${whole} of ${state.layers.length} stay on the device, the others stream`;
  fill("slots", state.slots, (cell, name) => { cell.className = name.replace(" ", "-"); });
  const counts = state.slots.reduce((sum, name) => ({ ...sum, [name]: (sum[name] || 0) + 1 }), {});
  at("slots-words").textContent = Object.entries(counts).map(([name, count]) => `${count} ${name}`).join(", ") || "none: nothing streams";
  const most = Math.max(1, ...state.accepted);
  fill("accepted", state.accepted, (bar, count, index) => {
    bar.style.height = `${(100 * count) / most}%`;
    bar.title = `${index}: ${count} times`;
  });
  const passes = state.accepted.reduce((sum, count) => sum + count, 0);
  const mean = state.accepted.reduce((sum, count, index) => sum + count * index, 0) / passes;
  at("accepted-words").textContent = passes ? `0 to ${state.accepted.length - 1} of a row, ${mean.toFixed(2)} in the mean` : "none yet";
}

function fill(id, values, set) {
  const box = at(id);
  while (box.children.length > values.length) box.lastChild.remove();
  while (box.children.length < values.length) box.append(document.createElement("i"));
  values.forEach((value, index) => set(box.children[index], value, index));
}

async function watch() {
  for (;;) {
    const controller = new AbortController();
    const leave = () => document.hidden && controller.abort();
    document.addEventListener("visibilitychange", leave);
    try {
      const response = await fetch("live", { headers: headers(), signal: controller.signal });
      if (response.status === 401) await askForKey();
      else for await (const event of events(response)) if (event.data) show(event.data);
    } catch (error) {
      if (error.name !== "AbortError") at("bottleneck").textContent = "the server does not answer";
    }
    document.removeEventListener("visibilitychange", leave);
    await new Promise((resolve) => setTimeout(resolve, 1000));
    while (document.hidden) await new Promise((resolve) => setTimeout(resolve, 500));
  }
}

watch();
