// The API of the server. Errors have message, hint and fields.

export class Failure extends Error {
  constructor(status, said) {
    super(said.message || `the server answered ${status}`);
    this.status = status;
    this.hint = said.hint || "";
    this.fields = said.fields || {};
  }
  get text() {
    return this.hint ? `${this.message}. ${this.hint}` : this.message;
  }
}

async function answer(response) {
  const text = await response.text();
  let said = null;
  try {
    said = text ? JSON.parse(text) : null;
  } catch {
    said = { message: text.slice(0, 300) };
  }
  if (!response.ok) throw new Failure(response.status, said || {});
  return said;
}

export async function get(path, signal) {
  return answer(await fetch(path, { signal }));
}

export async function send(method, path, body) {
  const options = body === undefined ? { method } : { method, body: JSON.stringify(body), headers: { "content-type": "application/json" } };
  return answer(await fetch(path, options));
}

export async function upload(file) {
  return answer(await fetch("/api/files", { method: "POST", body: file, headers: { "content-type": "application/octet-stream" } }));
}

export const fileURL = (name) => `/api/files/${encodeURIComponent(name)}`;
export const clipURL = (name) => `/api/clips/${encodeURIComponent(name)}`;

export function query(values) {
  const pairs = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) for (const item of [value].flat()) pairs.append(name, String(item));
  return pairs.toString();
}
