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
}

function toggleMachine() {
  $("panel").hidden = !$("panel").hidden;
  $("machine").setAttribute("aria-expanded", String(!$("panel").hidden));
  if (!$("panel").hidden) look();
}

// ---- the machine ----

let before = null;

function parse(metrics) {
  const found = {time: performance.now()};
  for (const line of metrics.split("\n")) {
    const match = line.match(/^([a-z_:]+)(?:\{[a-z]+="([a-z]+)"\})? (\S+)$/);
    if (match) found[match[2] ? `${match[1]}.${match[2]}` : match[1]] = Number(match[3]);
  }
  return found;
}

function draw(now, slot) {
  const since = (name) => now[name] - (before?.[name] ?? 0);
  const tokens = since("llamacpp:tokens_predicted_total"), prompt = since("llamacpp:prompt_tokens_total");
  if (tokens) $("speed").textContent = rate(tokens / since("llamacpp:tokens_predicted_seconds_total"));
  if (prompt) $("prompt-speed").textContent = rate(prompt / since("llamacpp:prompt_seconds_total"));
  if (tokens + prompt) $("per-token").textContent = bytes(since("fomoe_nvme_read_bytes_total") / (tokens + prompt)) + "/token";
  $("queue").textContent = `${now["llamacpp:requests_processing"]}, ${now["llamacpp:requests_deferred"]}`;
  const requests = since("fomoe_expert_requests_total");
  if (requests) {
    for (const tier of ["vram", "dram", "nvme"]) {
      const share = 100 * since(`fomoe_expert_hits_total.${tier}`) / requests;
      $(tier).textContent = share.toFixed(1) + " %";
      $("tiers").querySelector("." + tier).style.width = share + "%";
    }
  }
  $("prompt-total").textContent = now["llamacpp:prompt_tokens_total"].toLocaleString("en");
  $("cached-total").textContent = now["fomoe_prompt_tokens_cached_total"].toLocaleString("en");
  $("generated-total").textContent = now["llamacpp:tokens_predicted_total"].toLocaleString("en");
  $("read-total").textContent = bytes(now["fomoe_nvme_read_bytes_total"]);
  $("memory").textContent = bytes(now["fomoe_peak_rss_bytes"]);
  $("exact").textContent = now["fomoe_exact"] ? "exact" : "not exact (--car)";
  const isReading = slot?.is_processing && slot.n_prompt_tokens_processed < slot.n_prompt_tokens;
  $("prompt-part").hidden = !isReading;
  if (isReading) {
    $("prompt-count").textContent = `${slot.n_prompt_tokens_processed} of ${slot.n_prompt_tokens}`;
    $("prompt-bar").style.width = 100 * slot.n_prompt_tokens_processed / slot.n_prompt_tokens + "%";
  }
}

async function look() {
  if ($("panel").hidden || document.hidden) return;
  try {
    const [metrics, slots] = await Promise.all([fetch("metrics", {headers: headers()}), fetch("slots", {headers: headers()})]);
    if (!metrics.ok) throw new Error(await failure(metrics));
    const now = parse(await metrics.text());
    draw(now, slots.ok ? (await slots.json())[0] : null);
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
setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
setInterval(look, 1000);
begin();
greet();
