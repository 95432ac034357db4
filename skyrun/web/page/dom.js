// Small helpers: elements, texts, messages. Text from outside only ever becomes text nodes.

export const $ = (id) => document.getElementById(id);

export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
    else if (name === "data") Object.assign(node.dataset, value);
    else if (name in node && !["list", "form", "role"].includes(name)) node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return seconds < 10 ? `${Math.max(0, seconds).toFixed(1)} s` : `${whole} s`;
  if (whole < 3600) return whole < 600 && whole % 60 ? `${Math.floor(whole / 60)} min ${whole % 60} s` : `${Math.round(whole / 60)} min`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

export function bytes(count) {
  for (const [unit, scale] of [["GB", 1e9], ["MB", 1e6]]) if (count >= scale) return `${(count / scale).toFixed(1)} ${unit}`;
  return `${Math.round(count / 1e3)} kB`;
}

export const gib = (count) => `${(count / 2 ** 30).toFixed(1)} GiB`;
export const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);
export const words = (name) => sentence(name.replaceAll("_", " "));

let clearing = 0;
export function toast(text) {
  clearTimeout(clearing);
  $("toast").replaceChildren(el("p", {}, text));
  clearing = setTimeout(() => $("toast").replaceChildren(), Math.max(5000, text.length * 80));
}

export function sure(text, yes) {
  $("sure-text").textContent = text;
  $("sure-yes").textContent = yes;
  const dialog = $("sure");
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}
