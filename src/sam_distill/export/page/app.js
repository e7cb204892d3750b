// The page: photograph in, clicks and boxes, masks drawn over it.

import { frameSize, mask } from "./pixels.js";

const PER_SIDE = 8; // of the grid of clicks that segments everything
const COLOURS = [[30, 144, 255], [255, 99, 71], [60, 179, 113], [255, 165, 0], [186, 85, 211], [64, 224, 208], [240, 70, 150]];
const BOX = 6; // pixels that the pointer must move for a box

const $ = (id) => document.getElementById(id);
const buttons = ["everything", "clear", "save"].map($);
let about; // what the worker told of the model
let size; // [height, width] of the photograph in the frame, and of both canvases
let points = [];
let asked = 0; // grows with each question: answers to earlier ones are not shown
let drag; // where the pointer went down

const waiting = new Map();
let requests = 0;
let worker;

function ask(task, content = {}, told = () => {}) {
  return new Promise((resolve, reject) => {
    waiting.set(++requests, { resolve, reject, told });
    worker.postMessage({ id: requests, task, ...content });
  });
}

function receive({ data }) {
  const { resolve, reject, told } = waiting.get(data.id);
  if (data.progress) return told(data.progress);
  waiting.delete(data.id);
  return data.error ? reject(new Error(data.error)) : resolve(data.answer);
}

function say(text, progress = 0) {
  $("status").textContent = text;
  if (progress === null) $("progress").removeAttribute("value"); // no telling how far it is
  else $("progress").value = progress;
}

async function start() {
  if ("serviceWorker" in navigator) {
    await serviceWorker();
    if (!crossOriginIsolated && !sessionStorage.reloaded) { // the next load comes with more than one thread
      sessionStorage.reloaded = "yes";
      location.reload();
      return;
    }
  }
  worker = new Worker("worker.js", { type: "module" });
  worker.onmessage = receive;
  say("Loading the model …", null);
  about = await ask("load", {}, ({ bytes }) => say(`Loading the model … ${(bytes / 1e6).toFixed(1)} MB`, null));
  say(`${described()}. Drop a photograph.`);
}

/** Until it is at work, so that it keeps all that is fetched from now on. */
async function serviceWorker() {
  await navigator.serviceWorker.register("service-worker.js");
  const { active } = await navigator.serviceWorker.ready;
  while (active.state === "activating") await new Promise((resolve) => active.addEventListener("statechange", resolve, { once: true }));
}

function described() {
  return `Model ${(about.bytes / 1e6).toFixed(1)} MB at ${about.side} px, ${about.threads} thread${about.threads > 1 ? "s" : ""}`;
}

async function open(file) {
  say("Looking at the photograph …", null);
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  const whole = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
  whole.fillStyle = "white"; // behind transparent parts
  whole.fillRect(0, 0, bitmap.width, bitmap.height);
  whole.drawImage(bitmap, 0, 0);
  size = frameSize(bitmap.height, bitmap.width);
  for (const canvas of [$("photo"), $("masks")]) [canvas.height, canvas.width] = size;
  $("photo").getContext("2d").drawImage(bitmap, 0, 0, size[1], size[0]);
  $("hint").style.display = "none";
  clear();
  for (const button of buttons) button.disabled = true;
  const photograph = whole.getImageData(0, 0, bitmap.width, bitmap.height);
  const { milliseconds } = await ask("see", { photograph });
  for (const button of buttons) button.disabled = false;
  say(`${described()}. Looked at in ${Math.round(milliseconds)} ms. Click on a thing.`);
}

function clear() {
  points = [];
  asked++;
  $("masks").getContext("2d").clearRect(0, 0, size[1], size[0]);
}

async function show() {
  const question = ++asked;
  say("…", null);
  const { logits, iou, milliseconds } = await ask("ask", { points });
  if (question !== asked) return;
  draw([logits]);
  say(`Mask in ${Math.round(milliseconds)} ms, expected IoU ${iou.toFixed(2)}.`);
}

async function everything() {
  const question = ++asked;
  const [height, width] = size;
  say("Segmenting everything …", null);
  const progress = ({ done }) => question === asked && say(`Segmenting everything … ${Math.round(100 * done)}%`, done);
  const { masks, milliseconds } = await ask("everything", { height, width, perSide: PER_SIDE }, progress);
  if (question !== asked) return;
  points = [];
  draw(masks.map(({ logits }) => logits));
  say(`${masks.length} masks in ${(milliseconds / 1000).toFixed(1)} s.`);
}

/** Large masks first, so that small ones lie on them; then the points. */
function draw(masks) {
  const [height, width] = size;
  const pixels = new ImageData(width, height);
  const areas = masks.map((logits) => mask(logits, height, width)).map((m) => [m.reduce((a, b) => a + b, 0), m]);
  areas.sort((a, b) => b[0] - a[0]);
  areas.forEach(([, m], number) => {
    const colour = [...COLOURS[number % COLOURS.length], 140];
    for (let i = 0; i < m.length; i++) if (m[i]) pixels.data.set(colour, 4 * i);
  });
  const context = $("masks").getContext("2d");
  context.putImageData(pixels, 0, 0);
  for (const { x, y, label } of points) {
    if (label > 1) continue;
    context.beginPath();
    context.arc(x, y, 6, 0, 2 * Math.PI);
    context.fillStyle = label ? "#0a0" : "#d00";
    context.fill();
    context.strokeStyle = "#fff";
    context.lineWidth = 2;
    context.stroke();
  }
  const corners = points.filter(({ label }) => label > 1);
  if (corners.length) outline(...corners);
}

function outline(a, b) {
  const context = $("masks").getContext("2d");
  context.strokeStyle = "#0a0";
  context.lineWidth = 2;
  context.strokeRect(a.x, a.y, b.x - a.x, b.y - a.y);
}

/** Where an event is, in pixels of the frame. */
function place(event) {
  const area = $("masks").getBoundingClientRect();
  const [height, width] = size;
  return { x: ((event.clientX - area.left) * width) / area.width, y: ((event.clientY - area.top) * height) / area.height };
}

function far(a, b) {
  return Math.max(Math.abs(a.x - b.x), Math.abs(a.y - b.y)) >= BOX;
}

const guarded = (action) => (...given) => action(...given).catch((error) => say(`That failed: ${error.message}`));
const opened = guarded(open);
const shown = guarded(show);

$("masks").addEventListener("pointerdown", (event) => {
  if (about && !$("clear").disabled) drag = place(event);
});
$("masks").addEventListener("pointermove", (event) => {
  const here = place(event);
  if (!drag || !far(drag, here)) return;
  draw([]);
  outline(drag, here);
});
$("masks").addEventListener("pointerup", (event) => {
  if (!drag) return;
  const here = place(event);
  if (far(drag, here)) {
    const [left, right] = [drag.x, here.x].sort((a, b) => a - b);
    const [top, bottom] = [drag.y, here.y].sort((a, b) => a - b);
    points = [{ x: left, y: top, label: 2 }, { x: right, y: bottom, label: 3 }];
  } else {
    if (points.length === about.points) points = [];
    points.unshift({ ...here, label: event.shiftKey || event.button === 2 ? 0 : 1 });
  }
  drag = undefined;
  shown();
});
$("masks").addEventListener("contextmenu", (event) => event.preventDefault());
$("file").addEventListener("change", (event) => event.target.files[0] && opened(event.target.files[0]));
$("stage").addEventListener("dragover", (event) => {
  event.preventDefault();
  $("stage").classList.add("over");
});
$("stage").addEventListener("dragleave", () => $("stage").classList.remove("over"));
$("stage").addEventListener("drop", (event) => {
  event.preventDefault();
  $("stage").classList.remove("over");
  if (event.dataTransfer.files[0]) opened(event.dataTransfer.files[0]);
});
$("everything").addEventListener("click", guarded(everything));
$("clear").addEventListener("click", () => {
  clear();
  say(described());
});
$("save").addEventListener("click", () => {
  $("masks").toBlob((blob) => {
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: "mask.png" });
    link.click();
  });
});
guarded(start)();
