// The plan beside the form: whether it fits, how long it takes, memory over the stages as a picture.

import { Failure, get, query } from "./api.js";
import { $, duration, el, gib, sentence, svg } from "./dom.js";

const EMPTY = ["start", "write"]; // stages with nothing but the program in memory: no bars
const WIDTH = 440, HEIGHT = 150, LEFT = 34, TOP = 14, BOTTOM = 34;
let running = null;
let timer = 0;

// Ask for a plan soon; only the last one that is asked for is shown.
export function planSoon(form) {
  clearTimeout(timer);
  timer = setTimeout(() => plan(form), 250);
}

async function plan(form) {
  running?.abort();
  const mine = (running = new AbortController());
  $("plan").setAttribute("aria-busy", "true");
  if (!$("plan").children.length) $("plan").replaceChildren(el("p", { className: "quiet" }, "Looking at this machine…"));
  const { prompt, ...values } = form.request();
  const asked = prompt ? { ...values, prompt: prompt.slice(0, 2000) } : values;
  try {
    const said = await get(`/api/plan?${query(asked)}`, mine.signal);
    show(said, form.requests().length);
    tell(form, said.problems, "");
    $("h-resolution").textContent = `${said.size[1]} wide, ${said.size[0]} high${form.values.size ? ", as stated under Everything else" : ""}`;
    $("machine").textContent = `${said.hardware.name.value}, ${memory(said)} free`;
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof Failure)) return;
    $("plan").replaceChildren(el("p", { className: "verdict bad" }, "No plan yet"));
    const known = Object.keys(error.fields).length;
    tell(form, error.fields, known ? "" : error.text);
  } finally {
    if (mine === running) {
      $("plan").removeAttribute("aria-busy");
      $("make").disabled = false;
    }
  }
}

export function tell(form, fields, text) {
  const rest = [...form.problems(fields), ...(text ? [sentence(text)] : [])];
  $("problem").textContent = rest.join(". ");
  $("problem").hidden = !rest.length;
}

const memory = (said) => (said.plan.device === "cuda" ? `${gib(said.hardware.vram_free.value)} of video memory` : `${gib(said.hardware.ram_free.value)} of memory`);

function show(said, count) {
  const { plan } = said;
  const fits = !plan.problem;
  const about = [`${said.size[1]} × ${said.size[0]}`, `${said.frames} frames, ${duration(said.seconds)}`, `${plan.weight_type}`, plan.precision === "fast" ? "int8" : plan.dtype];
  $("plan").replaceChildren(
    el("p", { className: `verdict ${fits ? "good" : "bad"}` }, fits ? `About ${duration(plan.seconds)}${count > 1 ? ` each, ${duration(count * plan.seconds)} in all` : ""}` : "It will not fit"),
    fits ? el("p", {}, `It fits: ${(peak(plan) / 2 ** 30).toFixed(1)} of ${gib(plan.limit_bytes)} of ${plan.device === "cuda" ? "video memory" : "memory"}.`) : el("p", {}, `${sentence(plan.problem)}. ${plan.remedy ? `This would: ${plan.remedy}.` : ""}`),
    chart(plan),
    el("p", { className: "quiet" }, about.join(" · ")),
    ...(said.fetch ? [el("p", { className: "note" }, `The model ${said.fetch.model} is not here yet and is fetched first, from ${said.fetch.from.join(" or ")}: ${parts(said.model_bytes)}. What is converted while it arrives is larger before.`)] : []),
    ...plan.notes.map((note) => el("p", { className: "note" }, sentence(note))),
  );
  $("make").textContent = count > 1 ? `Make ${count} clips` : "Make the clip";
}

const gb = (bytes) => `${(bytes / 1e9).toFixed(1)} GB`;
const parts = (sizes) => `${Object.entries(sizes).map(([role, bytes]) => `${role} ${gb(bytes)}`).join(", ")}, ${gb(Object.values(sizes).reduce((sum, bytes) => sum + bytes, 0))} in all`;
const takes = (plan, stage) => (plan.device === "cuda" ? stage.device_bytes : stage.host_bytes);
const peak = (plan) => Math.max(...plan.stages.map((stage) => takes(plan, stage)));

// Bars as high as the memory of a stage, wider for longer ones; a dashed line at what may be used.
function chart(plan) {
  const most = Math.max(peak(plan), Math.min(plan.limit_bytes, 1.6 * peak(plan))) * 1.08;
  const y = (count) => HEIGHT - BOTTOM - (count / most) * (HEIGHT - BOTTOM - TOP);
  const room = WIDTH - LEFT - 4, least = 62;
  const stages = plan.stages.filter(({ name }) => !EMPTY.includes(name));
  const total = stages.reduce((sum, stage) => sum + stage.seconds, 0) || 1;
  const free = room - least * stages.length;
  let x = LEFT;
  const bars = stages.flatMap((stage) => {
    const width = least + (free * stage.seconds) / total, count = takes(plan, stage), here = x;
    x += width;
    const over = count > plan.limit_bytes ? " over" : "";
    return [
      svg("rect", { class: `bar${over}`, x: here + 1.5, y: y(count), width: width - 3, height: HEIGHT - BOTTOM - y(count), rx: 3 }),
      svg("text", { class: "mark", x: here + width / 2, y: y(count) - 3, "text-anchor": "middle" }, (count / 2 ** 30).toFixed(1)),
      svg("text", { x: here + width / 2, y: HEIGHT - 20, "text-anchor": "middle" }, stage.name),
      svg("text", { class: "pale", x: here + width / 2, y: HEIGHT - 6, "text-anchor": "middle" }, duration(stage.seconds)),
    ];
  });
  const limit = plan.limit_bytes < most ? [
    svg("line", { class: "limit", x1: LEFT, x2: WIDTH, y1: y(plan.limit_bytes), y2: y(plan.limit_bytes) }),
    svg("text", { class: "pale", x: WIDTH - 4, y: y(plan.limit_bytes) - 3, "text-anchor": "end" }, "may be used"),
  ] : [];
  const text = plan.stages.map((stage) => `${stage.name} ${gib(takes(plan, stage))}, ${duration(stage.seconds)}`).join("; ");
  return svg("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `Memory over the stages: ${text}` },
    svg("text", { class: "pale", x: 0, y: TOP + 2 }, "GiB"), svg("line", { class: "axis", x1: LEFT, x2: WIDTH, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM }), ...bars, ...limit);
}
