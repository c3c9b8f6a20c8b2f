// The page: up to two recordings, a question, an answer that comes in, and the prompts behind it.
"use strict";

const NAMES = {
  asr: "Transcribe", translation: "Translate", emotion: "Name the emotion", speaker_verification: "Same speaker?",
  speech_qa: "Ask a question", caption: "Describe the sound", language_id: "Name the language",
};
const at = (id) => document.getElementById(id);
const name = (task) => NAMES[task] ?? task;
const seconds = (x) => (x < 59.95 ? `${+x.toFixed(1)} s`
  : `${Math.floor(x / 60)} min${Math.round(x % 60) ? ` ${Math.round(x % 60)} s` : ""}`);
const percent = (x) => (x > 0 && x < 0.01 ? "< 1 %" : `${Math.round(100 * x)} %`);

let about;
let asked = null; // the AbortController of the answer that is coming

// --- recordings

class Slot {
  constructor(title) {
    this.clip = null;
    this.turn = 0; // of the newest file; an older one that comes in late is dropped
    this.element = at("slot").content.firstElementChild.cloneNode(true);
    this.part(".slot-title").textContent = title;
    this.part("input").addEventListener("change", (event) => {
      if (event.target.files[0]) this.take(event.target.files[0]);
      event.target.value = "";
    });
    this.part(".record").addEventListener("click", () => this.record());
    this.part(".remove").addEventListener("click", () => this.clear());
    this.part("audio").addEventListener("error", () => { this.part("audio").hidden = true; }); // a format it can't play
    for (const kind of ["dragover", "dragleave", "drop"])
      this.element.addEventListener(kind, (event) => {
        event.preventDefault();
        this.element.classList.toggle("over", kind === "dragover");
        if (kind === "drop" && event.dataTransfer.files[0]) this.take(event.dataTransfer.files[0]);
      });
  }

  part(selector) { return this.element.querySelector(selector); }

  clear() {
    this.turn += 1;
    this.clip = null;
    const audio = this.part("audio");
    URL.revokeObjectURL(audio.src);
    audio.removeAttribute("src");
    audio.hidden = false;
    this.show();
  }

  show() {
    this.element.classList.toggle("filled", this.clip !== null);
    this.part(".invite").hidden = this.clip !== null;
    this.part(".chosen").hidden = this.clip === null;
  }

  async take(file) {
    this.clear();
    complain("");
    const turn = this.turn;
    if (file.size > about.max_bytes)
      return complain(`${file.name}: larger than the limit of ${megabytes()}`);
    this.element.classList.add("busy");
    try {
      const { clip, seconds: length } = await call(`/clips?name=${encodeURIComponent(file.name)}`, {
        method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } });
      if (turn !== this.turn) return;
      this.clip = clip;
      this.part(".name").textContent = file.name;
      this.part(".length").textContent = seconds(length);
      this.part("audio").src = URL.createObjectURL(file);
      this.show();
    } catch (error) {
      if (turn === this.turn) complain(error.message);
    } finally {
      this.element.classList.remove("busy");
    }
  }

  async record() {
    if (this.recorder) return this.recorder.stop();
    const button = this.part(".record");
    try {
      const microphone = await navigator.mediaDevices.getUserMedia({ audio: true });
      const blocks = [];
      const began = performance.now();
      this.recorder = new MediaRecorder(microphone);
      this.recorder.addEventListener("dataavailable", (event) => blocks.push(event.data));
      const clock = setInterval(() => {
        const now = (performance.now() - began) / 1000;
        button.textContent = `stop (${seconds(now)})`;
        if (now >= about.max_seconds - 1 && this.recorder) this.recorder.stop();
      }, 100);
      this.recorder.addEventListener("stop", () => {
        clearInterval(clock);
        microphone.getTracks().forEach((track) => track.stop());
        const kind = this.recorder.mimeType;
        this.recorder = null;
        button.textContent = "record";
        button.classList.remove("recording");
        this.take(new File(blocks, `recording.${kind.includes("mp4") ? "m4a" : "webm"}`, { type: kind }));
      });
      this.recorder.start();
      button.classList.add("recording");
      complain("");
    } catch (error) {
      this.recorder = null;
      complain(`No microphone could be used (${error.message}). Choose a file instead.`);
    }
  }
}

const slots = [];
const pair = () => at("task").value === "speaker_verification";
const shown = () => slots.slice(0, pair() ? 2 : 1);

// --- asking

function megabytes() { return `${+(about.max_bytes / 2 ** 20).toFixed(1)} MB`; }

async function call(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is the program still running?");
  }
  if (response.ok) return response.headers.get("content-type").includes("ndjson") ? response : response.json();
  const told = await response.json().catch(() => ({}));
  throw new Error(told.error ?? `The server refused this (${response.status}).`);
}

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

async function ask() {
  const clips = shown().map((slot) => slot.clip);
  if (clips.includes(null)) return complain(pair() ? "Choose two recordings first." : "Choose a recording first.");
  const question = {
    clips, task: at("task").value, instruction: at("instruction").value.trim(),
    choices: at("choices").value.split(",").map((choice) => choice.trim()).filter(Boolean) };
  complain("");
  asked = new AbortController();
  working(true);
  let ended = false;
  try {
    const response = await call("/answers", {
      method: "POST", body: JSON.stringify(question), headers: { "Content-Type": "application/json" },
      signal: asked.signal });
    for await (const line of lines(response)) {
      if (line.text) at("answer").append(line.text);
      ended = ended || Boolean(line.answer || line.error);
      if (line.answer) finish(line.answer, line.timing);
      if (line.error) throw new Error(line.error);
    }
    if (!ended) throw new Error("The server broke off. Is the program still running?");
  } catch (error) {
    if (error.name === "AbortError") at("timing").textContent = "stopped";
    else complain(error.message);
    at("result").hidden = at("answer").textContent === "";
  } finally {
    asked = null;
    working(false);
  }
}

let ticking;
function working(on) {
  at("ask").disabled = on;
  at("stop").hidden = !on;
  at("answer").classList.toggle("coming", on);
  clearInterval(ticking);
  at("clock").textContent = "";
  if (!on) return;
  const began = performance.now();
  ticking = setInterval(() => { at("clock").textContent = seconds((performance.now() - began) / 1000); }, 100);
  at("answer").textContent = at("timing").textContent = "";
  at("result").hidden = false;
  at("prompts-section").hidden = at("likelihoods-section").hidden = true;
}

function complain(message) {
  at("error").textContent = message;
  at("error").hidden = !message;
}

// --- showing

function finish(answer, timing) {
  at("answer").textContent = answer.text || "(no words)";
  const pieces = answer.parts.length > 1 ? `, heard in ${answer.parts.length} pieces` : "";
  at("timing").textContent = `First words after ${timing.first.toFixed(2)} s, all after ${timing.total.toFixed(2)} s, ` +
    `for ${seconds(answer.seconds)} of audio (${(timing.total / answer.seconds).toFixed(2)} s a second)${pieces}.`;
  showLikelihoods(answer.parts[0]);
  showPrompts(answer.parts);
}

function showLikelihoods({ choices, likelihoods }) {
  at("likelihoods-section").hidden = !likelihoods.length;
  const most = Math.max(...likelihoods);
  const weights = likelihoods.map((x) => Math.exp(x - most));
  const sum = weights.reduce((a, b) => a + b, 0);
  const rows = choices.map((choice, i) => ({ label: choice, value: weights[i] / sum, shown: percent(weights[i] / sum) }));
  rows.sort((a, b) => b.value - a.value);
  at("likelihoods").tBodies[0].replaceChildren(...rows.map((row) => barRow(row, 1)));
}

function showPrompts(parts) {
  const scores = new Map(); // prompt → mean score over the pieces; 0 where a piece has not picked it
  for (const part of parts)
    part.prompts.forEach((prompt, i) => {
      if (prompt >= 0) scores.set(prompt, (scores.get(prompt) ?? 0) + part.scores[i] / parts.length);
    });
  at("prompts-section").hidden = !scores.size;
  const even = 1 / about.prompts;
  const most = Math.max(...scores.values(), even);
  at("prompts-note").textContent = about.selection === "similarity"
    ? `The ${parts[0].prompts.length} of ${about.prompts} that match best. Score: softmax over the pool` +
      `${parts.length > 1 ? ", mean over the pieces" : ""}; the line marks what each would have if all matched alike.`
    : `This pool (${about.selection}) does not choose by clip.`;
  const usual = Object.keys(about.usage).length > 0;
  at("usual").hidden = !usual;
  const rows = [...scores].sort((a, b) => b[1] - a[1]).map(([prompt, score]) => {
    const row = barRow({ label: `${prompt}`, value: score, shown: score.toFixed(3) }, most * 1.05, even);
    if (usual) row.append(usualTasks(prompt));
    return row;
  });
  at("prompts").tBodies[0].replaceChildren(...rows);
}

function usualTasks(prompt) {
  const cell = element("td", "usual");
  const used = Object.entries(about.usage).map(([task, usage]) => [task, usage[prompt] ?? 0]);
  used.sort((a, b) => b[1] - a[1]);
  if (used.length > 2 && used.at(-1)[1] >= 0.95) {
    cell.append(element("span", "task", `all ${used.length} tasks`));
    return cell;
  }
  const often = used.filter(([, share]) => share >= 0.05);
  cell.append(...often.map(([task, share]) => element("span", "task", `${task} ${percent(share)}`)));
  if (!often.length) cell.append(element("span", "task", "hardly any"));
  return cell;
}

function barRow({ label, value, shown: text }, most, even) {
  const row = document.createElement("tr");
  const track = element("td", "track");
  const bar = element("div", "bar");
  const fill = element("div", "fill");
  fill.style.width = `${(100 * value) / most}%`;
  bar.append(fill);
  if (even !== undefined) {
    const mark = element("div", "even");
    mark.style.left = `${(100 * even) / most}%`;
    bar.append(mark);
  }
  track.append(bar);
  row.append(element("td", "", label), element("td", "", text), track);
  return row;
}

function element(kind, className, text = "") {
  const made = document.createElement(kind);
  made.className = className;
  made.textContent = text;
  return made;
}

// --- beginning

function chooseTask() {
  const task = about.tasks.find(({ name: known }) => known === at("task").value);
  at("instruction-label").textContent = task.instruction ? "In your own words (optional)" : "Your question";
  at("instruction").placeholder = task.instruction || "What is the caller asked to do?";
  slots[1].element.hidden = !pair();
  slots[0].part(".slot-title").textContent = pair() ? "First recording" : "";
}

async function begin() {
  try {
    about = await call("/about", {});
  } catch (error) {
    return complain(error.message);
  }
  at("about").textContent = `${about.checkpoint} · recordings up to ${seconds(about.max_seconds)} and ${megabytes()}, ` +
    `for anything but transcribing ${seconds(about.window)}`;
  const evaluated = new Set(Object.keys(about.usage));
  const group = (label, tasks) => {
    const made = document.createElement("optgroup");
    made.label = label;
    made.append(...tasks.map((task) => new Option(name(task.name), task.name)));
    return made;
  };
  const [known, rest] = [true, false].map((yes) => about.tasks.filter((task) => evaluated.has(task.name) === yes));
  if (known.length) at("task").append(group("evaluated with this checkpoint", known), group("others", rest));
  else at("task").append(...rest.map((task) => new Option(name(task.name), task.name)));
  slots.push(new Slot(""), new Slot("Second recording"));
  at("slots").append(...slots.map((slot) => slot.element));
  at("task").addEventListener("change", chooseTask);
  at("form").addEventListener("submit", (event) => { event.preventDefault(); if (!asked) ask(); });
  at("stop").addEventListener("click", () => asked?.abort());
  chooseTask();
}

begin();
