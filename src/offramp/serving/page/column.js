// A column: the text of one way to decode, coloured by depth, with its figures.

export const TITLES = { exit: "Exits", full: "Full depth", speculative: "Speculative" };
const UNSAFE = new RegExp(
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u200b\\u200e\\u200f" +
  "\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb\\u{e0000}-\\u{e007f}]", "gu");
const MARKS = [[/^\n+$/, "↵"], [/^\t+$/, "→"], [/^$/, "·"]];

/** What a reader would not see, or what changes the order of text, as an escape. */
export const printable = (text) => text.replace(UNSAFE,
  (each) => `\\u${each.codePointAt(0).toString(16).padStart(4, "0")}`);

/** Colour and height of a token by the share of the layers that it ran. */
export function paint(element, layer, layers) {
  element.style.setProperty("--share", String(layers > 1 ? (layer - 1) / (layers - 1) : 1));
}

const rounded = (number, digits = 1) => Number.isFinite(number) ? number.toFixed(digits) : "–";

export class Column {
  /** `about` is the server's description of the model; `tell` shows a line on a token. */
  constructor(method, about, tell) {
    const part = document.getElementById("column").content.cloneNode(true);
    this.method = method;
    this.about = about;
    this.element = part.querySelector("article");
    this.text = part.querySelector(".text");
    this.note = part.querySelector(".note");
    this.figures = Object.fromEntries([...part.querySelectorAll("[data-figure]")]
      .map((each) => [each.dataset.figure, each]));
    part.querySelector("h2").textContent = TITLES[method];
    this.text.setAttribute("aria-label", `Text: ${TITLES[method]}`);
    this.element.dataset.method = method;
    this.text.addEventListener("focusin", (event) => tell(event.target.dataset.about));
    this.text.addEventListener("pointerover", (event) => tell(event.target.dataset.about));
    this.text.addEventListener("keydown", (event) => this.move(event));
    this.clear("");
  }

  /** Begin again with this prompt. */
  clear(prompt) {
    this.layers = [];
    this.first = this.last = 0;
    this.text.replaceChildren();
    if (prompt) {
      const before = document.createElement("span");
      before.className = "prompt";
      before.textContent = printable(prompt);
      this.text.append(before);
    }
    this.say("");
    this.figures.accepted.parentElement.hidden = true;
    for (const each of Object.values(this.figures)) each.textContent = "–";
  }

  say(note) {
    this.note.textContent = note;
  }

  /** The figures in a line, for those who do not see them. */
  get summary() {
    const { tokens, speed, layers } = this.figures;
    return `${TITLES[this.method]}: ${tokens.textContent} tokens, ${speed.textContent} tokens/s, ` +
      `mean layers ${layers.textContent}`;
  }

  /** Add a token as it came from the server. Its text is never read as HTML. */
  add({ text, exit_layer: layer, confidence }) {
    const element = document.createElement("span");
    element.className = "token";
    element.textContent = printable(text);
    const mark = MARKS.find(([pattern]) => pattern.test(text));
    if (mark) element.dataset.mark = mark[1];
    const sure = typeof confidence === "number" ? `, confidence ${confidence.toFixed(3)}` : "";
    const name = text ? printable(JSON.stringify(text)) : "a token without text of its own";
    element.dataset.layer = `layer ${layer}`;
    element.dataset.about = `${name}: layer ${layer} of ${this.about.num_layers}${sure}`;
    element.tabIndex = this.layers.length ? -1 : 0;
    paint(element, layer, this.about.num_layers);
    this.text.append(element);
    this.layers.push(layer);
    this.last = performance.now();
    this.first ||= this.last;
    this.show();
  }

  /** The figures so far, by the tokens that came. */
  show() {
    const count = this.layers.length;
    const mean = (values) => values.reduce((sum, each) => sum + each, 0) / count;
    this.figures.tokens.textContent = String(count);
    this.figures.speed.textContent = rounded(1000 * (count - 1) / (this.last - this.first));
    if (this.method === "speculative") return; // drafts that were rejected cost, too: see finish
    this.layersMean(mean(this.layers));
    this.flops(mean(this.layers.map((layer) => this.about.flops_pct?.[layer] ?? NaN)));
  }

  /** The server's own figures, at the end. */
  finish(figures) {
    if (Number.isFinite(figures.mean_layers)) this.layersMean(figures.mean_layers);
    if (Number.isFinite(figures.flops_pct)) this.flops(figures.flops_pct);
    if (Number.isFinite(figures.tokens_per_s)) {
      this.figures.speed.textContent = rounded(figures.tokens_per_s);
    }
    if (Number.isFinite(figures.acceptance_rate)) {
      this.figures.accepted.parentElement.hidden = false;
      this.figures.accepted.textContent = `${rounded(100 * figures.acceptance_rate, 0)}%`;
    }
  }

  layersMean(mean) {
    this.figures.layers.textContent = `${rounded(mean)} of ${this.about.num_layers}`;
  }

  flops(percent) {
    this.figures.flops.textContent = Number.isFinite(percent) ? `${rounded(percent, 0)}%` : "–";
  }

  /** The arrow keys move between tokens, which are one stop of the Tab key. */
  move(event) {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    const tokens = [...this.text.querySelectorAll(".token")];
    const from = tokens.indexOf(document.activeElement);
    let to = from + (steps[event.key] ?? 0);
    if (event.key === "Home") to = 0;
    if (event.key === "End") to = tokens.length - 1;
    if (from < 0 || to === from || !tokens[to]) return;
    event.preventDefault();
    tokens[from].tabIndex = -1;
    tokens[to].tabIndex = 0;
    tokens[to].focus();
  }
}
