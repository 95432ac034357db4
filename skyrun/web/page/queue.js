// The queue: a card for each job, kept as long as its status is the same, so that buttons stay under the pointer.

import { fileURL, send } from "./api.js";
import { $, duration, el, gib, sentence, sure, toast } from "./dom.js";

const jobs = new Map();
const cards = new Map(); // id -> { node, status, parts }
const HIDDEN = ["done"]; // they are among the clips
const WAITS = ["waiting", "paused"];

export function setJobs(list) {
  jobs.clear();
  for (const job of list) jobs.set(job.id, job);
  show();
}

export function setJob(job) {
  const before = jobs.get(job.id);
  jobs.set(job.id, job);
  if (before && before.status === job.status && before.order === job.order && cards.has(job.id)) update(cards.get(job.id), job);
  else show();
  if (before && before.status !== job.status && job.status === "failed") toast(`A clip failed: ${job.error.message}`);
  if (before && before.status !== job.status && job.status === "done") toast(`${job.clip} is made.`);
}

export function removeJob(id) {
  jobs.delete(id);
  show();
}

function ordered() {
  const rank = { running: 0, stopping: 0, waiting: 1, paused: 1 };
  const place = (job) => rank[job.status] ?? 2;
  return [...jobs.values()].filter((job) => !HIDDEN.includes(job.status)).sort((a, b) => place(a) - place(b) || (place(a) === 2 ? b.order - a.order : a.order - b.order));
}

function show() {
  const list = ordered(), focused = focus();
  for (const [id, card] of cards) {
    const job = jobs.get(id);
    if (!job || job.status !== card.status) { card.node.remove(); cards.delete(id); }
  }
  list.forEach((job, index) => {
    if (!cards.has(job.id)) cards.set(job.id, build(job));
    const card = cards.get(job.id);
    if ($("queue").children[index] !== card.node) $("queue").insertBefore(card.node, $("queue").children[index] || null);
    update(card, job);
  });
  const waiting = list.filter((job) => job.status === "waiting").length;
  $("queue-count").textContent = list.length ? `${list.length - list.filter((job) => job.error || job.status === "cancelled").length} to make` : "";
  $("queue-empty").hidden = list.length > 0;
  document.body.dataset.waiting = waiting;
  refocus(focused);
  title();
}

function focus() {
  const button = document.activeElement?.closest?.("#queue [data-act]");
  return button && { id: button.closest("li").dataset.id, act: button.dataset.act };
}

function refocus(before) {
  if (!before || (document.activeElement && document.activeElement !== document.body)) return;
  const card = cards.get(before.id)?.node;
  const button = card?.querySelector(`[data-act="${before.act}"]:not(:disabled)`) || card?.querySelector("button:not(:disabled)") || $("queue").querySelector("button");
  (button || $("f-prompt"))?.focus();
}

function act(job, name, label, does, style = "") {
  return el("button", { type: "button", className: style, data: { act: name }, "aria-label": `${label}: ${brief(job)}`, title: label, on: { click: async (event) => {
    try {
      await does(event.currentTarget);
    } catch (error) {
      toast(error.text || error.message);
    }
  } } }, name === "up" ? "↑" : name === "down" ? "↓" : name === "first" ? "⤒" : label);
}

const brief = (job) => (job.request.prompt || "").slice(0, 60);
const post = (job, what) => () => send("POST", `/api/jobs/${job.id}/${what}`);

function place(job) {
  return ordered().filter((other) => WAITS.includes(other.status)).findIndex((other) => other.id === job.id);
}

function build(job) {
  const { request, status } = job;
  const parts = {};
  const thumbs = [...(request.images || [])].slice(0, status === "failed" ? 2 : 1).map((name) => el("img", { src: fileURL(name), alt: "", className: "thumb", loading: "lazy" }));
  const about = el("div", { className: "about" }, el("p", { className: "prompt" }, request.prompt || ""), parts.facts = el("p", { className: "quiet" }));
  const move = (by) => () => send("PATCH", `/api/jobs/${job.id}`, { position: by === 0 ? 0 : place(job) + by });
  const remove = act(job, "remove", "Remove", () => send("DELETE", `/api/jobs/${job.id}`));
  const again = act(job, "again", "Again with another seed", post(job, "again"));
  const buttons = {
    running: [act(job, "pause", "Pause", post(job, "pause")), act(job, "cancel", "Cancel", () => send("DELETE", `/api/jobs/${job.id}`)), log(job, parts)],
    stopping: [el("span", { className: "quiet" }, "keeping what is finished…"), act(job, "cancel", "End it at once", async () => {
      if (await sure("End it at once? What is not kept yet is lost.", "End it")) await send("DELETE", `/api/jobs/${job.id}`);
    })],
    waiting: [act(job, "first", "Make this one next", move(0)), act(job, "up", "Earlier", move(-1)), act(job, "down", "Later", move(1)), act(job, "pause", "Pause", post(job, "pause")), remove],
    paused: [act(job, "resume", "Go on", post(job, "resume"), "main"), act(job, "up", "Earlier", move(-1)), act(job, "down", "Later", move(1)), remove],
    failed: [act(job, "resume", "Try to go on", post(job, "resume"), "main"), again, remove, log(job, parts)],
    cancelled: [act(job, "resume", "Go on", post(job, "resume")), again, remove],
  }[status] || [remove];
  const node = el("li", { className: `job card ${status}`, data: { id: job.id } });
  if (status === "running" || status === "stopping") {
    parts.preview = el("img", { className: "preview", alt: "What the clip will look like", hidden: true });
    parts.bar = el("progress", { max: 1, "aria-label": "This stage" });
    parts.whole = el("progress", { max: 1, className: "whole", "aria-label": "The whole clip" });
    parts.stage = el("p", { className: "stage" });
    parts.notes = el("p", { className: "note", hidden: true });
    node.append(el("div", { className: "stagebox" }, parts.preview, el("div", {}, parts.stage, parts.bar, parts.whole)), parts.notes);
  }
  const error = job.error ? [el("p", { className: "problem" }, sentence(job.error.message)), el("p", { className: "quiet" }, sentence(job.error.hint || ""))] : [];
  node.append(el("div", { className: "head" }, ...(status === "running" ? [] : thumbs), about), ...error, el("div", { className: "row" }, buttons));
  return { node, status, parts };
}

function log(job, parts) {
  let timer = 0;
  const text = el("pre", { hidden: true, tabIndex: 0, "aria-label": "Log" });
  const read = async () => {
    const said = await (await fetch(`/api/jobs/${job.id}/log`)).text();
    if (said !== text.textContent) text.textContent = said;
    if (!text.isConnected || text.hidden) clearInterval(timer);
  };
  const button = act(job, "log", "Log", async () => {
    text.hidden = !text.hidden;
    button.setAttribute("aria-expanded", String(!text.hidden));
    clearInterval(timer);
    if (text.hidden) return;
    button.closest("li").append(text);
    await read();
    timer = setInterval(read, 2000);
  });
  button.setAttribute("aria-expanded", "false");
  return button;
}

export function left(job) {
  const { left, told } = job.progress;
  return left === null || told === null ? null : Math.max(0, left - (Date.now() / 1000 - told));
}

// How much of the clip is done, by time.
export function share(job) {
  const ahead = left(job), { begun } = job.progress;
  if (ahead === null || begun === null) return null;
  const done = Math.max(0, Date.now() / 1000 - begun);
  return Math.min(0.99, done / (done + ahead || 1));
}

function update(card, job) {
  const { parts } = card, { progress } = job;
  const size = progress.plan.size ? ` · ${progress.plan.size[1]} × ${progress.plan.size[0]}` : "";
  const status = { waiting: "waits", paused: "paused", failed: "failed", cancelled: "cancelled" }[job.status];
  parts.facts.textContent = [status, job.request.task, `seed ${job.request.seed}${size}`, progress.plan.weight_type, progress.plan.peak_bytes && gib(progress.plan.peak_bytes)].filter(Boolean).join(" · ");
  if (!parts.bar) return;
  if (progress.previews && parts.preview.dataset.at !== String(progress.previews)) {
    parts.preview.dataset.at = progress.previews;
    parts.preview.src = `/api/jobs/${job.id}/preview?step=${progress.previews}`;
    parts.preview.hidden = false;
  }
  parts.notes.hidden = !progress.notices.length;
  parts.notes.textContent = progress.notices.length ? sentence(progress.notices.at(-1)) : "";
  tick(card, job);
}

function tick(card, job) {
  const { parts } = card, { progress } = job;
  const done = Math.min(progress.total, progress.done + (progress.blocks ? progress.block / progress.blocks : 0));
  if (progress.total && progress.stage) parts.bar.value = done / progress.total;
  else parts.bar.removeAttribute("value");
  const whole = share(job), ahead = left(job);
  if (whole === null) parts.whole.removeAttribute("value");
  else parts.whole.value = whole;
  const window = progress.part ? `window ${progress.part[0]} of ${progress.part[1]}, ` : "";
  const count = progress.total > 1 ? ` ${Math.floor(progress.done)} of ${progress.total} ${progress.unit}` : "";
  const text = progress.stage ? `${window}${progress.stage}${count}` : "getting ready";
  parts.stage.textContent = sentence(text) + (ahead === null || job.status === "stopping" ? "" : ahead > 0 ? `, about ${duration(ahead)} left` : ", nearly done");
}

function title() {
  const job = [...jobs.values()].find((other) => other.status === "running");
  if (!job) {
    document.title = "skyrun";
    return;
  }
  const whole = share(job), ahead = left(job);
  document.title = `${whole === null ? "…" : `${Math.round(100 * whole)} %`}${ahead ? `, ${duration(ahead)} left` : ""} · skyrun`;
}

setInterval(() => {
  for (const [id, card] of cards) if (card.parts.bar && jobs.has(id)) tick(card, jobs.get(id));
  title();
}, 1000);
