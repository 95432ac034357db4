// The page: the form with its plan, the queue, the clips, and the events that keep them current.

import { get, send, upload } from "./api.js";
import { $, toast } from "./dom.js";
import { Form } from "./form.js";
import * as gallery from "./gallery.js";
import { planSoon, tell } from "./plan.js";
import { removeJob, setJob, setJobs } from "./queue.js";

async function begin() {
  const about = await get("/api/form");
  const form = new Form(about, () => planSoon(form));
  planSoon(form);
  gallery.begin(form);
  listen();
  drops(form);
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    make(form);
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) {
      event.preventDefault();
      form.paste([...event.clipboardData.files]);
    }
  });
}

async function make(form) {
  form.asked = true;
  $("make").disabled = true;
  const requests = form.requests();
  let made = 0;
  try {
    for (const request of requests) {
      setJob(await send("POST", "/api/jobs", request));
      made += 1;
    }
    form.asked = false;
    tell(form, {}, "");
    toast(made > 1 ? `${made} clips are in the queue.` : "The clip is in the queue.");
  } catch (error) {
    tell(form, error.fields || {}, Object.keys(error.fields || {}).length ? "" : error.text || error.message);
    form.showFirstProblem();
  }
  $("make").disabled = false;
}

function listen() {
  const events = new EventSource("/api/events");
  events.addEventListener("message", ({ data }) => {
    const said = JSON.parse(data);
    if (said.event === "jobs") {
      setJobs(said.jobs);
      gallery.refreshSoon();
    } else if (said.event === "job") setJob(said.job);
    else if (said.event === "removed") removeJob(said.id);
    else if (said.event === "clips") gallery.refreshSoon();
  });
  events.addEventListener("open", () => ($("offline").hidden = true));
  events.addEventListener("error", () => {
    $("offline").hidden = false;
    if (events.readyState === EventSource.CLOSED) setTimeout(listen, 3000);
  });
  addEventListener("pagehide", () => events.close());
  addEventListener("pageshow", (event) => event.persisted && listen());
}

// Files that are dropped beside the fields: settings of a clip, or something for the form.
function drops(form) {
  let depth = 0;
  const over = (shown) => {
    depth = shown ? depth : 0;
    $("drop").hidden = !shown;
  };
  const files = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragenter", (event) => files(event) && ++depth && !event.target.closest?.(".zone") && over(true));
  addEventListener("dragleave", (event) => files(event) && --depth <= 0 && over(false));
  addEventListener("dragover", (event) => files(event) && event.preventDefault());
  document.addEventListener("dropped", () => over(false));
  addEventListener("drop", async (event) => {
    if (!files(event)) return;
    event.preventDefault();
    over(false);
    for (const file of event.dataTransfer.files) {
      toast(`Looking at ${file.name}…`);
      try {
        const said = await upload(file);
        if (said.request) form.fill(said.request);
        else form.put(said);
      } catch (error) {
        toast(`${file.name}: ${error.text || error.message}`);
      }
    }
  });
}

begin().catch((error) => {
  $("plan").textContent = error.text || error.message;
  setTimeout(() => location.reload(), 5000);
});
