// The form: built from what the server says of tasks and fields, remembered, filled in from clips.

import { Inputs } from "./inputs.js";
import { $, el, sentence, toast, words } from "./dom.js";

const KEY = "skyrun.form";
const LATER = ["prompt", "images", "video", "audio"]; // missing at first, and not worth a complaint before the button
const OWN = ["task", "prompt", "images", "video", "audio", "resolution", "seconds", "prefer", "seed"]; // have a place of their own
const FILES = ["images", "video", "audio"];

export class Form {
  constructor(about, changed) {
    this.about = about;
    this.changed = changed;
    this.values = this.remembered();
    this.count = 1;
    this.lines = false;
    this.asked = false;
    this.build();
  }

  get task() {
    return this.about.tasks.find((task) => task.name === this.values.task) || this.about.tasks[0];
  }

  remembered() {
    let values = {};
    try {
      values = JSON.parse(localStorage.getItem(KEY)) || {};
    } catch { /* not ours, or forbidden */ }
    const known = new Set(this.about.fields.map((field) => field.name));
    values = Object.fromEntries(Object.entries(values).filter(([name]) => known.has(name)));
    if (!this.about.tasks.some((task) => task.name === values.task)) values.task = this.about.tasks[0].name;
    return values;
  }

  set(name, value) {
    const empty = value === "" || value === null || value === undefined || value === false || (Array.isArray(value) && !value.length);
    if (empty) delete this.values[name];
    else this.values[name] = value;
    this.keep();
  }

  keep() {
    try {
      localStorage.setItem(KEY, JSON.stringify(this.values));
    } catch { /* not remembered then */ }
    this.changed();
  }

  // What is sent: only what the task takes.
  request() {
    const task = this.task;
    const takes = { images: task.images[1] > 0, video: task.video, audio: task.audio };
    const fits = ([name]) => {
      const field = this.about.fields.find((other) => other.name === name);
      return (takes[name] ?? true) && (!field.tasks.length || field.tasks.includes(task.name)) && !(name === "seconds" && this.values.frames);
    };
    return Object.fromEntries(Object.entries(this.values).filter(fits));
  }

  // One request for each line of the prompt and each seed that is asked for.
  requests() {
    const { prompt = "", seed, ...rest } = this.request();
    const prompts = this.lines ? prompt.split("\n").map((line) => line.trim()).filter(Boolean) : [prompt];
    if (!prompts.length) prompts.push("");
    const seeds = Array.from({ length: this.count }, (_, index) => (seed === undefined ? undefined : Number(seed) + index));
    return prompts.flatMap((text) => seeds.map((start) => ({ ...rest, prompt: text, ...(start === undefined ? {} : { seed: start }) })));
  }

  fill(request, extra = {}) {
    const values = { ...request, ...extra };
    const task = this.about.tasks.find((other) => other.name === values.task);
    if (!task) return toast(`This server has no task ${values.task}.`);
    if (values.frames && !(task.whole_seconds && (values.frames - 1) % task.fps)) {
      values.seconds = Math.round(((values.frames - 1) / task.fps) * 1000) / 1000;
      delete values.frames;
    }
    if (Array.isArray(values.size)) values.size = values.size.join("x");
    this.values = values;
    this.filledFor = values.task;
    this.asked = false;
    this.build();
    this.keep();
    const missing = FILES.filter((name) => (name === "images" ? task.images[0] > (values.images || []).length : task[name] && !values[name]));
    toast(missing.length ? `The form is filled in. What the clip was made from is not here any more: add its ${missing.join(", ")} again.` : "The form is filled in.");
    $("new-title").scrollIntoView({ behavior: "smooth", block: "start" });
    $("f-prompt").focus({ preventScroll: true });
  }

  // Put a file that is uploaded where it belongs.
  put(said) {
    const field = said.kind === "image" ? "images" : said.kind;
    const place = this.inputs[field] || (said.sound && this.inputs.audio);
    if (place) place.add(said);
    else toast(`${this.task.name} takes no ${said.kind}: choose another task first.`);
  }

  paste(files) {
    for (const file of files) {
      const field = file.type.startsWith("image/") ? "images" : file.type.startsWith("audio/") ? "audio" : "video";
      if (this.inputs[field]) this.inputs[field].take([file]);
      else toast(`${this.task.name} takes no such file: choose another task first.`);
    }
  }

  build() {
    const task = this.task;
    this.inputs = {};
    const add = (field, label, most) => {
      const inputs = (this.inputs[field] = new Inputs(field, label, most, (names) => this.set(field, field === "images" ? names : names[0])));
      const value = this.values[field];
      inputs.set(value ? [value].flat() : []);
      return inputs.node;
    };
    const fields = this.about.fields.filter((field) => !OWN.includes(field.name));
    const mine = fields.filter((field) => field.tasks.includes(task.name));
    const more = fields.filter((field) => !field.tasks.length);
    const open = $("more")?.open ?? false;
    $("form").replaceChildren(
      this.tasks(task),
      ...(task.images[1] ? [add("images", task.images[1] > 1 ? `${sentence(task.image_name)}, ${task.images.join(" to ")}` : sentence(task.image_name.replace(/s$/, "")), task.images[1])] : []),
      ...(task.video ? [add("video", "Video", 1)] : []),
      ...(task.audio ? [add("audio", "Speech", 1)] : []),
      this.prompt(),
      el("div", { className: "pair" }, this.choice("resolution", "Size", task.resolutions, task.defaults.resolution), this.seconds(task)),
      ...mine.map((field) => this.field(field)),
      el("div", { className: "pair" }, this.choice("prefer", "What matters most", this.about.preferences, task.defaults.prefer || this.about.preferences[0]), this.seeds()),
      el("details", { id: "more", open }, el("summary", {}, "Everything else"), el("div", { className: "grid" }, more.map((field) => this.field(field)))),
    );
    this.showSize();
  }

  tasks(task) {
    const pick = (name) => {
      this.keepShared(name);
      this.set("task", name);
      this.asked = false;
      this.build();
      $(`task-${name}`).focus();
    };
    return el("fieldset", { className: "tasks", data: { field: "task" } }, el("legend", { className: "label" }, "What to make"),
      this.about.tasks.map((other) => el("label", {}, el("input", {
        type: "radio", name: "task", id: `task-${other.name}`, value: other.name, checked: other === task, on: { change: () => pick(other.name) },
      }), el("span", {}, el("b", {}, other.name), " ", other.does))));
  }

  // For another task than that of the clip which filled the form in, keep what means the same there, and the files.
  keepShared(task) {
    if (!this.filledFor || task === this.filledFor) return;
    const shared = new Set(this.about.fields.filter((field) => field.shared).map((field) => field.name));
    this.values = Object.fromEntries(Object.entries(this.values).filter(([name]) => shared.has(name) || FILES.includes(name)));
    this.filledFor = null;
  }

  prompt() {
    const lines = el("input", { type: "checkbox", id: "lines", checked: this.lines, on: { change: () => { this.lines = lines.checked; this.changed(); } } });
    const each = el("label", { className: "check" }, lines, "a clip for each line");
    const area = el("textarea", {
      id: "f-prompt", rows: 3, value: this.values.prompt || "", placeholder: "A woman walks by the sea and looks at the camera.",
      "aria-describedby": "e-prompt", on: { input: () => { this.set("prompt", area.value); each.hidden = !area.value.trim().includes("\n"); if (each.hidden) { this.lines = lines.checked = false; } } },
    });
    each.hidden = !area.value.trim().includes("\n");
    return this.wrap("prompt", "What the clip shows", area, each);
  }

  choice(name, label, choices, usual) {
    return el("fieldset", { className: "pills", data: { field: name } }, el("legend", { className: "label" }, label),
      el("div", { className: "row" }, choices.map((choice) => el("label", {}, el("input", {
        type: "radio", name, value: choice, checked: (this.values[name] || usual) === choice,
        on: { change: () => { if (name === "resolution") this.drop("size"); this.set(name, choice); } },
      }), el("span", {}, choice)))), el("p", { className: "quiet", id: `h-${name}` }), el("p", { id: `e-${name}`, className: "problem", hidden: true }));
  }

  seconds(task) {
    const [least, most] = task.seconds;
    const number = el("input", {
      type: "number", id: "f-seconds", min: least || 0.1, max: most, step: task.whole_seconds ? 1 : "any", value: this.values.seconds ?? "",
      placeholder: task.audio ? "as long as the speech" : String(task.defaults.seconds), "aria-describedby": "e-seconds",
      on: { input: () => { this.drop("frames"); this.set("seconds", number.value === "" ? null : Number(number.value)); } },
    });
    const range = least ? `${least} to ${most}` : `up to ${most}`;
    return this.wrap("seconds", "Seconds", number, el("p", { className: "quiet" }, task.audio ? `${range} s, by default all of the speech` : task.windowed ? `${range} s` : `${range} s; the model was trained on 5`));
  }

  seeds() {
    const count = el("input", { type: "number", id: "count", min: 1, max: 50, value: this.count, "aria-label": "How many clips", on: { input: () => { this.count = Math.min(50, Math.max(1, Math.round(count.valueAsNumber) || 1)); this.changed(); } } });
    const seed = el("input", { type: "text", inputMode: "numeric", id: "f-seed", value: this.values.seed ?? "", placeholder: "drawn", "aria-describedby": "e-seed", on: { input: () => this.set("seed", seed.value.trim() === "" ? null : /^\d{1,15}$/.test(seed.value.trim()) ? Number(seed.value) : seed.value) } });
    return this.wrap("seed", "Seed, and how many clips", el("div", { className: "row tight" }, seed, el("span", { "aria-hidden": "true" }, "×"), count));
  }

  field(field) {
    const { name, kind } = field;
    const value = this.values[name];
    const id = `f-${name}`;
    const described = { id, "aria-describedby": `h-${name} e-${name}` };
    const choices = name === "transition" ? this.task.transitions : field.choices;
    const hint = el("p", { id: `h-${name}`, className: "quiet" }, field.hint);
    if (kind === "flag") {
      const box = el("input", { ...described, type: "checkbox", checked: Boolean(value), on: { change: () => this.set(name, box.checked) } });
      return el("div", { className: "field", data: { field: name } }, el("label", { className: "check" }, box, words(name)), hint, el("p", { id: `e-${name}`, className: "problem", hidden: true }));
    }
    if (choices.length) {
      const select = el("select", { ...described, on: { change: () => this.set(name, select.value) } }, el("option", { value: "" }, "by itself"), choices.map((choice) => el("option", { value: choice, selected: choice === value }, choice)));
      return this.wrap(name, words(name), select, hint);
    }
    if (kind === "texts" || kind === "files") {
      const area = el("textarea", { ...described, rows: 2, value: (value || []).join("\n"), placeholder: "one a line", on: { input: () => this.set(name, area.value.split("\n").map((line) => line.trim()).filter(Boolean)) } });
      const here = this.about.files.length ? el("div", { className: "row tight" }, this.about.files.map((file) => el("button", { type: "button", className: "small", on: { click: () => { area.value = [...area.value.split("\n").filter(Boolean), file].join("\n"); area.dispatchEvent(new Event("input")); } } }, `+ ${file}`))) : null;
      return this.wrap(name, words(name), area, here, hint);
    }
    const numeric = kind === "whole" || kind === "number";
    const input = el("input", {
      ...described, type: numeric ? "number" : "text", step: kind === "whole" ? 1 : "any", value: value ?? "", placeholder: name === "steps" ? String(this.task.steps) : "by itself",
      list: name === "model" ? "models" : undefined, autocomplete: "off",
      on: { input: () => { if (name === "frames") this.drop("seconds"); this.set(name, input.value === "" ? null : numeric ? Number(input.value) : input.value); if (name === "size") this.showSize(); } },
    });
    const names = name === "model" ? el("datalist", { id: "models" }, this.about.models.filter((model) => !model.task || model.task === this.task.name).map((model) => el("option", { value: model.name }))) : null;
    return this.wrap(name, words(name), input, names, hint);
  }

  // Forget a field, because another one says the same.
  drop(name) {
    delete this.values[name];
    if ($(`f-${name}`)) $(`f-${name}`).value = "";
    this.showSize();
  }

  showSize() {
    document.querySelector('[data-field="resolution"]')?.classList.toggle("off", Boolean(this.values.size));
  }

  wrap(name, label, control, ...others) {
    return el("div", { className: "field", data: { field: name } }, el("label", { className: "label", htmlFor: control.id || `f-${name}` }, label), control, ...others.filter(Boolean), el("p", { id: `e-${name}`, className: "problem", hidden: true }));
  }

  // Show what is wrong at its field. Returns what has no field here.
  problems(found) {
    for (const note of $("form").querySelectorAll(".problem")) note.hidden = true;
    for (const input of $("form").querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
    const rest = [];
    for (const [name, texts] of Object.entries(found)) {
      if (!this.asked && LATER.includes(name) && !this.values[name]?.length) continue;
      const note = $(`e-${name}`);
      if (!note) { rest.push(...texts); continue; }
      note.textContent = texts.map(sentence).join(". ");
      note.hidden = false;
      const input = $(`f-${name}`);
      input?.setAttribute("aria-invalid", "true");
      if (input && $("more").contains(input)) $("more").open = true;
    }
    return rest;
  }

  showFirstProblem() {
    const first = [...$("form").querySelectorAll(".problem")].find((note) => !note.hidden);
    const field = first?.closest("[data-field]");
    field?.scrollIntoView({ behavior: "smooth", block: "center" });
    field?.querySelector("input, textarea, select")?.focus({ preventScroll: true });
  }
}
