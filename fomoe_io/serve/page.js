"use strict";
// The page at /: a chat, and what the machine does meanwhile.  No library, nothing from elsewhere; text is never HTML.

const $ = (id) => document.getElementById(id);
const log = $("log"), text = $("text");
let messages = [];     // of the conversation: {role, content}
let running = null;    // the AbortController of the answer that is coming
let last = null;       // the last answer's element

// ---- small things ----

function element(parent, kind, name, content) {
  const made = document.createElement(kind);
  if (name) made.className = name;
  if (content !== undefined) made.textContent = content;
  parent.append(made);
  return made;
}

const headers = () => ($("key").value ? {Authorization: "Bearer " + $("key").value} : {});
const isAtEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 40;
const bytes = (n) => n >= 1e9 ? (n / 1e9).toFixed(2) + " GB" : n >= 1e6 ? (n / 1e6).toFixed(1) + " MB" : (n / 1e3).toFixed(0) + " kB";
const rate = (n) => (n >= 100 ? n.toFixed(0) : n >= 10 ? n.toFixed(1) : n.toFixed(2)) + " tok/s";

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return "the server says " + response.status;
  }
}

// ---- an answer ----

function answerElement() {
  const box = element(log, "article", "assistant at-work");
  const thoughts = element(box, "details", "thoughts");
  thoughts.hidden = true;
  element(thoughts, "summary", "", "Thoughts");
  const view = {
    box, thoughts, thought: element(thoughts, "div"), said: element(box, "div", "said"), about: element(box, "div", "about"),
  };
  view.note = element(view.about, "span");
  return view;
}

function finish(view, note, isError) {
  view.box.classList.remove("at-work");
  view.note.textContent = note;
  view.note.className = isError ? "error" : "";
  const again = element(view.about, "button", "again", "Regenerate");
  again.type = "button";
  again.title = "Alt+R";
  again.onclick = regenerate;
  if (!navigator.clipboard) return;  // not on this machine, and no https
  const copy = element(view.about, "button", "", "Copy");
  copy.type = "button";
  copy.onclick = () => navigator.clipboard.writeText(view.said.textContent);
}

function show(view, chunk, answer) {
  const stay = isAtEnd();
  const progress = chunk.prompt_progress, delta = chunk.choices[0]?.delta ?? {};
  if (progress && progress.processed < progress.total) {
    view.note.textContent = `reading the prompt: ${progress.processed} of ${progress.total} tokens`;
  } else if (progress) {
    view.note.textContent = "";
  }
  if (delta.reasoning_content) {
    view.thoughts.hidden = false;
    view.thought.append(delta.reasoning_content);
  }
  if (delta.content) {
    view.said.append(delta.content);
    answer.content += delta.content;
  }
  if (chunk.timings) answer.timings = chunk.timings;
  if (chunk.choices[0]?.finish_reason) answer.reason = chunk.choices[0].finish_reason;
  if (stay) log.scrollTop = log.scrollHeight;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    held += value;
    const whole = held.split("\n\n");
    held = whole.pop();
    for (const event of whole) {
      const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function request() {
  const system = $("system").value.trim();
  const body = {messages: system ? [{role: "system", content: system}, ...messages] : messages, stream: true, return_progress: true};
  if ($("temperature").value !== "") body.temperature = Number($("temperature").value);
  if ($("most").value !== "") body.max_tokens = Number($("most").value);
  if (!$("thinking").checked) body.chat_template_kwargs = {enable_thinking: false};
  return body;
}

function footer(answer) {
  const t = answer.timings;
  if (!t) return "";
  const parts = [`${t.predicted_n} tokens`, rate(t.predicted_per_second), `prompt ${t.prompt_n} read`];
  if (t.cache_n) parts.push(`${t.cache_n} known`);
  if (answer.reason === "length") parts.push("cut off at the limit");
  return parts.join(", ");
}

async function answer() {
  const view = answerElement(), found = {content: ""}, talk = messages;  // "New" begins another
  last?.querySelector(".again")?.remove();
  last = view.box;
  running = new AbortController();
  state();
  log.scrollTop = log.scrollHeight;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: {"Content-Type": "application/json", ...headers()}, body: JSON.stringify(request()), signal: running.signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      show(view, chunk, found);
    }
    finish(view, footer(found), false);
  } catch (error) {
    const stopped = error.name === "AbortError";
    finish(view, stopped ? "stopped" : error.message, !stopped);
  }
  talk.push({role: "assistant", content: found.content});
  running = null;
  state();
}

// ---- what a user does ----

function ask() {
  const content = text.value.trim();
  if (!content || running) return;
  log.querySelector(".hint")?.remove();
  messages.push({role: "user", content});
  element(log, "article", "user", content);
  text.value = "";
  grow();
  answer();
}

function regenerate() {
  if (running || messages.at(-1)?.role !== "assistant") return;
  messages.pop();
  last.remove();
  last = null;
  answer();
}

function begin() {
  running?.abort();
  messages = [];
  last = null;
  log.replaceChildren();
  element(log, "p", "hint", "Enter sends, Shift+Enter breaks the line, Esc stops.  Alt+N: new, Alt+R: regenerate, Alt+M: machine.");
  text.focus();
}

function state() {
  $("send").textContent = running ? "Stop" : "Send";
}

function grow() {
  text.style.height = "auto";
  text.style.height = text.scrollHeight + 2 + "px";
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  drawMap();
}

function toggleMachine() {
  $("panel").hidden = !$("panel").hidden;
  $("machine").setAttribute("aria-expanded", String(!$("panel").hidden));
  if (!$("panel").hidden) look();
}

// ---- the machine ----

let before = null;      // what /machine said last
let layers = [];        // of it: {layer, slots, vram, dram, tiers, heat}
let chosen = -1;        // the row that the map tells of

const percent = (part, whole) => (whole > 0 ? 100 * part / whole : 0).toFixed(1) + " %";

function draw(now) {
  const since = (name) => now[name] - (before?.[name] ?? 0);
  const tokens = since("generated_tokens"), prompt = since("prompt_tokens"), requests = since("expert_requests");
  if (tokens) $("speed").textContent = rate(tokens / since("decode_seconds"));
  if (prompt) $("prompt-speed").textContent = rate(prompt / since("prompt_seconds"));
  if (tokens + prompt) {
    $("per-token").textContent = bytes(since("nvme_bytes") / (tokens + prompt)) + "/token";
    $("stall").textContent = percent(since("stall_seconds"), since("prompt_seconds") + since("decode_seconds"));
  }
  $("queue").textContent = `${now.at_work}, ${now.waiting}`;
  if (requests) {
    $("swaps").textContent = now.exact ? "off" : percent(since("substitutions"), requests);
    for (const tier of ["vram", "dram", "nvme"]) {
      const share = 100 * (now.hits[tier] - (before?.hits[tier] ?? 0)) / requests;
      $(tier).textContent = share.toFixed(1) + " %";
      $("tiers").querySelector("." + tier).style.width = share + "%";
    }
  }
  $("prompt-total").textContent = now.prompt_tokens.toLocaleString("en");
  $("cached-total").textContent = now.cached_tokens.toLocaleString("en");
  $("generated-total").textContent = now.generated_tokens.toLocaleString("en");
  $("read-total").textContent = bytes(now.nvme_bytes);
  $("memory").textContent = bytes(now.peak_rss_bytes);
  $("exact").textContent = now.exact ? "exact" : `not exact (--car ${now.car})`;
  const isReading = now.prompt && now.prompt.processed < now.prompt.total;
  $("prompt-part").hidden = !isReading;
  if (isReading) {
    $("prompt-count").textContent = `${now.prompt.processed} of ${now.prompt.total}`;
    $("prompt-bar").style.width = 100 * now.prompt.processed / now.prompt.total + "%";
  }
  layers = now.layers;
  drawMap();
}

function color(name) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

// A pixel an expert: its tier is the colour, how often it was picked the strength
function drawMap() {
  const map = $("map"), columns = Math.max(...layers.map((layer) => layer.tiers.length), 1);
  map.hidden = !layers.length;
  if (!layers.length) return;
  map.width = columns;
  map.height = layers.length;
  map.style.height = Math.min(Math.max(3 * layers.length, 60), 320) + "px";
  const context = map.getContext("2d"), image = context.createImageData(columns, layers.length);
  const colors = {v: color("--vram"), d: color("--dram"), ".": color("--nvme")};
  layers.forEach(({tiers, heat}, row) => {
    for (let expert = 0; expert < tiers.length; expert++) {
      const share = (heat.charCodeAt(expert) - 48) / 9, tier = tiers[expert];
      const strength = tier === "." ? 0.75 * share : 0.35 + 0.65 * share;
      image.data.set([...colors[tier], Math.round(255 * strength)], 4 * (row * columns + expert));
    }
  });
  context.putImageData(image, 0, 0);
  tellLayer();
}

function tellLayer() {
  chosen = Math.min(chosen, layers.length - 1);
  const sum = (name) => layers.reduce((total, layer) => total + layer[name], 0);
  const one = layers[chosen];
  const all = layers.reduce((total, layer) => total + layer.tiers.length, 0);
  $("map-about").textContent = one
    ? `layer ${one.layer}: ${one.vram} in VRAM, ${one.dram} in DRAM, of ${one.tiers.length}`
    : `${layers.length} layers: ${sum("vram")} in VRAM, ${sum("dram")} in DRAM, of ${all}`;
}

function choose(row) {
  chosen = Math.max(-1, Math.min(row, layers.length - 1));
  tellLayer();
}

async function look() {
  if ($("panel").hidden || document.hidden) return;
  try {
    const response = await fetch("machine", {headers: headers()});
    if (!response.ok) throw new Error(await failure(response));
    const now = await response.json();
    draw(now);
    before = now;
    $("state").textContent = "";
  } catch (error) {
    $("state").textContent = error.message;
  }
}

async function greet() {
  try {
    const response = await fetch("v1/models");
    if (!response.ok) throw new Error(await failure(response));
    $("model").textContent = (await response.json()).data[0].id;
    $("state").textContent = "";
  } catch (error) {
    $("state").textContent = error.message;
    setTimeout(greet, 1000);
  }
}

// ---- wiring ----

$("ask").onsubmit = (event) => {
  event.preventDefault();
  if (running) running.abort();
  else ask();
};
text.oninput = grow;
text.onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
};
document.onkeydown = (event) => {
  if (event.key === "Escape") running?.abort();
  const action = event.altKey && {n: begin, r: regenerate, m: toggleMachine}[event.key.toLowerCase()];
  if (action) {
    event.preventDefault();
    action();
  }
};
$("new").onclick = begin;
$("machine").onclick = toggleMachine;
$("theme").onclick = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
$("key").onchange = look;
$("map").onkeydown = (event) => {
  const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
  if (!step) return;
  event.preventDefault();
  choose(chosen + step);
};
$("map").onpointermove = (event) => choose(Math.floor(event.offsetY / $("map").clientHeight * layers.length));
$("map").onpointerleave = () => choose(-1);
setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
setInterval(look, 1000);
begin();
greet();
