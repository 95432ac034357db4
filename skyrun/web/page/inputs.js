// Pictures, videos and sound: dropped, pasted, chosen or recorded, uploaded at once, shown as they are.

import { fileURL, upload } from "./api.js";
import { el, toast } from "./dom.js";

const ACCEPT = { images: "image/*", video: "video/*", audio: "audio/*,video/*" };

// A place for the files of one field. most: how many it takes. changed: called with the names of the files.
export class Inputs {
  constructor(field, label, most, changed) {
    this.field = field;
    this.most = most;
    this.changed = changed;
    this.names = [];
    const input = el("input", {
      type: "file", id: `f-${field}`, accept: ACCEPT[field], multiple: most > 1, className: "hidden-input",
      "aria-describedby": `e-${field}`, on: { change: () => this.take([...input.files]).then(() => (input.value = "")) },
    });
    this.input = input;
    this.list = el("ul", { className: "thumbs" });
    this.text = el("span", {}, "");
    this.zone = el("label", { className: "zone" }, input, this.text);
    const extra = field === "audio" && navigator.mediaDevices && window.MediaRecorder ? [this.recorder()] : [];
    this.node = el("div", { className: "field", data: { field } },
      el("span", { className: "label" }, label), this.list, this.zone, ...extra, el("p", { id: `e-${field}`, className: "problem", hidden: true }));
    for (const kind of ["dragover", "dragenter"]) this.zone.addEventListener(kind, (event) => { event.preventDefault(); this.zone.classList.add("over"); });
    this.zone.addEventListener("dragleave", () => this.zone.classList.remove("over"));
    this.zone.addEventListener("drop", (event) => {
      event.preventDefault();
      event.stopPropagation();
      document.dispatchEvent(new Event("dropped"));
      this.zone.classList.remove("over");
      this.take([...event.dataTransfer.files]);
    });
    this.show();
  }

  async take(files) {
    for (const file of files) {
      this.zone.classList.add("busy");
      this.text.textContent = `uploading ${file.name}…`;
      try {
        const said = await upload(file);
        this.add(said);
      } catch (error) {
        toast(`${file.name}: ${error.text || error.message}`);
      }
      this.zone.classList.remove("busy");
      this.show();
    }
  }

  // Take a file that is uploaded already, if it is of the right kind.
  add(said) {
    const kind = this.field === "images" ? "image" : this.field;
    if (said.kind !== kind && !(kind === "audio" && said.sound)) {
      toast(`This is ${said.kind === "image" ? "an image" : said.kind}, and goes elsewhere.`);
      return;
    }
    this.set([...this.names, said.file].slice(-this.most));
    this.changed(this.names);
  }

  set(names) {
    this.names = [...new Set(names)].slice(0, this.most);
    this.show();
  }

  remove(name) {
    this.set(this.names.filter((other) => other !== name));
    this.changed(this.names);
    this.input.focus();
  }

  show() {
    const what = { images: "a picture", video: "a video", audio: "a recording" }[this.field];
    const full = this.names.length >= this.most;
    const verb = this.names.length ? (full ? "Replace" : "Add another: drop") : "Drop, paste or choose";
    this.text.textContent = this.names.length ? (full ? `${verb}: drop or choose ${what}` : `${verb}, paste or choose ${what}`) : `${verb} ${what}`;
    this.list.replaceChildren(...this.names.map((name, index) => el("li", {}, this.picture(name), el("button", {
      type: "button", className: "small", "aria-label": `Remove ${what.slice(2)} ${index + 1}`, on: { click: () => this.remove(name) },
    }, "×"))));
    this.list.hidden = !this.names.length;
  }

  picture(name) {
    const gone = () => {
      this.set(this.names.filter((other) => other !== name));
      this.changed(this.names);
      toast("A file that the form referred to is not there any more. Add it again.");
    };
    if (this.field === "images") return el("img", { src: fileURL(name), alt: `Picture ${this.names.indexOf(name) + 1}`, on: { error: gone } });
    const tag = this.field === "video" ? "video" : "audio";
    return el(tag, { src: fileURL(name), controls: true, muted: tag === "video", preload: "metadata", "aria-label": words(this.field), on: { error: () => fetch(fileURL(name), { method: "HEAD" }).then((r) => r.status === 404 && gone()) } });
  }

  recorder() {
    let recording = null;
    const button = el("button", { type: "button", on: { click: async () => {
      if (recording) return recording.stop();
      try {
        const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
        const parts = [];
        recording = new MediaRecorder(stream);
        recording.addEventListener("dataavailable", (event) => parts.push(event.data));
        recording.addEventListener("stop", () => {
          stream.getTracks().forEach((track) => track.stop());
          recording = null;
          button.textContent = "Record with the microphone";
          this.take([new File(parts, "recording")]);
        });
        recording.start();
        button.textContent = "Stop recording";
      } catch (error) {
        toast(`The microphone cannot be used: ${error.message}`);
      }
    } } }, "Record with the microphone");
    return button;
  }
}

const words = (field) => ({ video: "Video", audio: "Recording" })[field];
