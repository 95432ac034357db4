// The clips of the folder: pictures, players, and what can be done with each.

import { clipURL, get, send } from "./api.js";
import { $, bytes, duration, el, sentence, sure, toast } from "./dom.js";

let form = null;
let shown = new Map(); // name -> { node, stamp }
let timer = 0;

export function begin(of) {
  form = of;
  refreshSoon();
}

export function refreshSoon() {
  clearTimeout(timer);
  timer = setTimeout(refresh, 150);
}

async function refresh() {
  let clips;
  try {
    clips = await get("/api/clips");
  } catch {
    return; // the next event tries again
  }
  const before = shown;
  shown = new Map();
  for (const clip of clips) {
    const stamp = `${clip.modified} ${clip.bytes} ${clip.known}`;
    const kept = before.get(clip.name);
    shown.set(clip.name, kept?.stamp === stamp ? kept : { stamp, node: card(clip) });
  }
  const nodes = [...shown.values()].map(({ node }) => node);
  if (nodes.length !== $("clips").children.length || nodes.some((node, index) => node !== $("clips").children[index])) $("clips").replaceChildren(...nodes);
  $("clips-count").textContent = clips.length || "";
  $("clips-empty").hidden = clips.length > 0;
}

function facts(clip) {
  const request = clip.request || {};
  return [request.task, clip.width && `${clip.width} × ${clip.height}`, clip.seconds && duration(clip.seconds), request.seed !== undefined && `seed ${request.seed}`, bytes(clip.bytes)].filter(Boolean).join(" · ");
}

function card(clip) {
  const picture = clip.known && !clip.problem ? el("img", { src: `${clipURL(clip.name)}/poster?of=${clip.modified}`, alt: "", loading: "lazy", width: 3 * clip.width, height: 2 * clip.height }) : el("span", { className: "blank" });
  const title = clip.request?.prompt || clip.name;
  return el("li", { className: "clip card" },
    el("button", { type: "button", className: "poster", "aria-label": `Play ${title}`, on: { click: () => play(clip) } }, picture),
    el("p", { className: "prompt" }, title),
    el("p", { className: "quiet" }, clip.problem ? sentence(clip.problem) : facts(clip)),
    actions(clip));
}

function actions(clip, done = () => {}) {
  const request = clip.request;
  const next = form.about.tasks.filter((task) => task.video);
  return el("div", { className: "row" },
    ...(request ? [el("button", { type: "button", on: { click: () => { done(); form.fill(request); } } }, "Again with…")] : []),
    el("details", { className: "menu" }, el("summary", { className: "button" }, "Go on…"),
      el("div", { className: "items" }, next.map((task) => el("button", { type: "button", on: { click: () => { done(); form.fill({ task: task.name, prompt: request?.prompt, video: clip.name, model: next.some((other) => other.name === request?.task) ? request?.model : undefined }); } } }, el("b", {}, task.name), ` ${task.does}`)))),
    el("a", { className: "button", href: `${clipURL(clip.name)}?download`, download: clip.name }, "Download"),
    el("button", { type: "button", className: "bad", "aria-label": `Delete ${clip.name}`, on: { click: () => remove(clip, done) } }, "Delete"));
}

async function remove(clip, done) {
  if (!(await sure(`Delete ${clip.name} with its files? This cannot be undone.`, "Delete"))) return;
  try {
    await send("DELETE", clipURL(clip.name));
    done();
  } catch (error) {
    toast(error.text || error.message);
  }
  refreshSoon();
}

function play(clip) {
  const dialog = $("player");
  const close = () => dialog.close();
  const rows = Object.entries(clip.request || {}).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, Array.isArray(value) ? value.join(name === "size" ? " × " : ", ") : String(value))));
  dialog.replaceChildren(
    el("video", { src: clipURL(clip.name), controls: true, loop: true, autoplay: true, playsInline: true, "aria-label": clip.request?.prompt || clip.name }),
    el("h3", {}, clip.name), el("dl", {}, rows),
    el("div", { className: "row" }, actions(clip, close), el("button", { type: "button", on: { click: close } }, "Close")));
  dialog.addEventListener("close", () => dialog.replaceChildren(), { once: true });
  dialog.showModal();
}

document.addEventListener("click", (event) => {
  for (const menu of document.querySelectorAll("details.menu[open]")) if (!menu.contains(event.target) || event.target.closest(".items")) menu.open = false;
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const menu of document.querySelectorAll("details.menu[open]")) {
    menu.open = false;
    menu.querySelector("summary").focus();
  }
});
