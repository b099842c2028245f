// The page: reads the controls, runs the requests, and says in words what went wrong.

import { Column, TITLES, paint } from "./column.js";
import { ServerError, ask, events } from "./stream.js";

const by = (id) => document.getElementById(id);
const RANGES = { // of each confidence: lowest and highest threshold, step, first value, unit
  share: [0, 1, 0.01, 0.9, "share of the last layer's probability that an exit must keep"],
  gain: [-2, 0, 0.01, -0.1, "expected change in nats"],
  patience: [1, 2, 1, 1, "exits in a row that predict the same token"],
  saturation: [-1, 1, 0.01, 0.9, "cosine of two successive states"],
  other: [0, 1, 0.01, 0.9, "from 0 to 1"],
};
const AGAIN_AFTER = 300; // ms after the last move of the slider

let name, about, columns = {}, running = null, again;

const said = (text) => { by("status").textContent = text; };
const failed = (text) => { by("error").textContent = text; };
const key = () => by("key").value;

async function start() {
  failed("");
  try {
    const { data } = await (await ask("/v1/models", { key: key() })).json();
    name = data[0].id;
    about = data[0].offramp;
  } catch (error) {
    explain(error);
    return;
  }
  by("key-row").hidden = true;
  describe();
}

/** Fill in what depends on the model. */
function describe() {
  const { num_layers: layers, exit_layers: exits, certificate } = about;
  const early = exits.filter((layer) => layer < layers);
  by("model").textContent =
    `${name}: ${layers} layers, ${early.length ? `exits ${early.join(", ")}` : "no exits"}`;
  by("untrained").hidden = about.exits_trained || !early.length;
  by("chat-row").hidden = !about.chat;
  if (about.max_tokens) by("max-tokens").max = about.max_tokens;
  by("max-tokens").value = Math.min(by("max-tokens").value, about.max_tokens || Infinity);
  by("missing-kv").disabled = Boolean(certificate);
  if (certificate) by("missing-kv").value = certificate.missing_kv;
  if (!early.length) {
    document.querySelector("[value=full]").checked = true;
    for (const other of ["exit", "speculative", "all"]) {
      document.querySelector(`[value=${other}]`).disabled = true;
    }
    by("threshold").disabled = by("confidence").disabled = true;
  }
  by("legend").replaceChildren(...exits.map(legendEntry));
  fillConfidences();
  showColumns();
}

function legendEntry(layer) {
  const entry = document.createElement("li"), swatch = document.createElement("span");
  swatch.className = "token";
  paint(swatch, layer, about.num_layers);
  entry.append(swatch, layer === about.num_layers ? `${layer} (full depth)` : String(layer));
  return entry;
}

/** The confidences that may be chosen. Of a certificate it is its own. */
function fillConfidences() {
  const { certificate, default_confidence: usual } = about;
  const named = (value, text) => new Option(text, value);
  const options = certificate
    ? [named(certificate.confidence, `${certificate.confidence} (certificate)`)]
    : about.confidences.map((each) =>
      named(each, each === "gain" ? "gain, in nats" : each === usual ? `${each} (default)` : each));
  if (!certificate && usual === "gain") {
    options.unshift(named("", "gain, as a share of probability (default)"));
  }
  by("confidence").replaceChildren(...options);
  if (!certificate) by("confidence").value = usual === "gain" ? "" : usual;
  setRange();
}

/** The slider has the range of the confidence; a certificate's thresholds are its lower limit. */
function setRange() {
  const chosen = by("confidence").value, slider = by("threshold"), bound = certified();
  const kind = chosen === "" ? "share" : chosen in RANGES ? chosen : "other";
  let [lowest, highest, step, first, unit] = RANGES[kind];
  if (kind === "patience") highest = Math.max(1, about.exit_layers.length - 1);
  if (bound !== null) {
    lowest = first = bound;
    highest = Math.max(highest, bound);
    step = "any";
  }
  Object.assign(slider, { min: lowest, max: highest, step, value: first });
  by("threshold-help").textContent = `A token leaves at an exit whose ${chosen || "gain"} is at least ` +
    `this (${unit}). Lower is faster` +
    (bound === null ? "." : `; ${bound.toFixed(3)} is the certificate's limit.`);
  showThreshold();
}

/** A threshold of JSON, which has no infinity. */
const asNumber = (written) => typeof written === "number" ? written :
  written === "-inf" ? -Infinity : Infinity;

/** The lowest threshold of the certificate, or null. */
function certified() {
  const numbers = about.certificate?.thresholds.map(asNumber).filter(Number.isFinite) ?? [];
  return numbers.length ? Math.min(...numbers) : null;
}

function showThreshold() {
  const text = Number(by("threshold").value).toFixed(by("confidence").value === "patience" ? 0 : 2);
  by("threshold-value").textContent = text;
  by("threshold").setAttribute("aria-valuetext", text);
}

const chosen = () => {
  const method = document.querySelector("[name=method]:checked").value;
  return method === "all" ? ["full", "exit", "speculative"] : [method];
};

function showColumns() {
  columns = Object.fromEntries(chosen().map((method) =>
    [method, columns[method] ?? new Column(method, about, (line) => {
      if (line) by("token").textContent = line;
    })]));
  by("columns").replaceChildren(...Object.values(columns).map((column) => column.element));
}

/** The body of a request for one way to decode. */
function requestFor(method, prompt) {
  const asked = {
    model: name,
    max_tokens: Number(by("max-tokens").value),
    temperature: Number(by("temperature").value),
    seed: Number(by("seed").value),
    stream: true,
  };
  if (by("chat").checked) asked.messages = [{ role: "user", content: prompt }];
  else asked.prompt = prompt;
  if (method === "speculative") asked.speculative = true;
  if (method === "full" && about.certificate) asked.threshold = "inf"; // else the certificate's
  if (method !== "exit") return asked;
  const threshold = Number(by("threshold").value), limits = about.certificate?.thresholds;
  asked.threshold = limits?.map((each) => asNumber(each) < threshold ? threshold : each) ?? threshold;
  if (by("confidence").value) asked.confidence = by("confidence").value;
  asked.missing_kv = by("missing-kv").value;
  return asked;
}

/** Run these columns one after another, so that each has the machine to itself. */
async function run(methods) {
  stop();
  if (!about) return start(); // the key was entered, or the server is back
  if (!by("controls").reportValidity()) return;
  const prompt = by("prompt").value, mine = new AbortController();
  running = mine;
  by("stop").setAttribute("aria-disabled", "false");
  failed("");
  for (const method of methods) columns[method].clear(by("chat").checked ? "" : prompt);
  try {
    for (const method of methods) {
      said(`Running: ${TITLES[method]}`);
      await fill(columns[method], requestFor(method, prompt), mine.signal);
    }
    said(`Done: ${methods.map((method) => columns[method].summary).join("; ")}`);
  } catch (error) {
    if (mine === running || !mine.signal.aborted) explain(error);
  }
  if (mine === running) ended();
}

async function fill(column, body, signal) {
  const path = body.messages ? "/v1/chat/completions" : "/v1/completions";
  const response = await ask(path, { key: key(), body, signal });
  for await (const { choices, offramp } of events(response)) {
    for (const token of offramp?.tokens ?? []) column.add(token);
    const why = choices?.[0]?.finish_reason;
    if (!why) continue;
    column.finish(offramp ?? {});
    const cut = why === "length" ? "Cut at the largest number of new tokens. " : "";
    column.say(`${cut}${column.method === "speculative" ? "Rejected drafts count, too." : ""}`);
  }
}

function stop() {
  running?.abort();
}

function ended() {
  running = null;
  by("stop").setAttribute("aria-disabled", "true");
}

function explain(error) {
  if (error.name === "AbortError") {
    said("Stopped.");
    return;
  }
  said("");
  failed(error instanceof ServerError ? error.message : `The page failed: ${error.message}`);
  if (error.status === 401) {
    by("key-row").hidden = false;
    by("key").focus();
  }
}

/** Run the exits again with the new threshold, if they were run before. */
function runAgain() {
  clearTimeout(again);
  if (!columns.exit?.layers.length && !running) return;
  again = setTimeout(() => run(running ? chosen() : ["exit"]), AGAIN_AFTER);
}

by("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  run(chosen());
});
by("controls").addEventListener("invalid", (event) => { // a folded control takes no focus
  event.target.closest("details")?.setAttribute("open", "");
}, true);
by("stop").addEventListener("click", stop);
by("use-key").addEventListener("click", start);
by("methods").addEventListener("change", () => {
  stop();
  clearTimeout(again);
  showColumns();
});
by("confidence").addEventListener("change", () => { setRange(); runAgain(); });
by("threshold").addEventListener("input", showThreshold);
by("threshold").addEventListener("change", runAgain);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run(chosen());
  }
});
start();
