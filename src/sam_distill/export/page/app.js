// User interface: open a photograph, prompt the model (in worker.js) with clicks and boxes, draw the masks it returns.
// Coordinates are (x, y) in pixels of the frame: the photograph resized so that its long side is 1024.

import { frameSize, upscaleMask } from "./pixels.js";

const POINTS_PER_SIDE = 8; // "Segment everything" prompts with a grid of 8 x 8 clicks
const COLOURS = [[30, 144, 255], [255, 99, 71], [60, 179, 113], [255, 165, 0], [186, 85, 211], [64, 224, 208], [240, 70, 150]];
const MIN_DRAG = 6; // frame pixels; a shorter movement of the pointer is a click, not a box

const $ = (id) => document.getElementById(id);
const buttons = ["everything", "clear", "save"].map($);
let modelInfo; // result of the worker's task "load": {bytes, threads, imageSize, maxPoints}; undefined until then
let size; // [height, width] of the photograph in the frame, and of both canvases
let points = []; // prompt: [{x, y, label}]; label 1 foreground, 0 background, 2 a box's top left, 3 its bottom right
let latestPrompt = 0; // incremented by each new prompt and by clear(); results of earlier prompts are discarded
let dragStart; // {x, y} where the pointer went down; undefined while it is up
const pendingRequests = new Map(); // request id -> {resolve, reject, onProgress}
let lastRequestId = 0;
let worker;

/** Send a task to the worker and return a promise of its result; worker.js describes the messages. */
function request(task, content = {}, onProgress = () => {}) {
  return new Promise((resolve, reject) => {
    pendingRequests.set(++lastRequestId, { resolve, reject, onProgress });
    worker.postMessage({ id: lastRequestId, task, ...content });
  });
}

function receiveMessage({ data }) {
  const { resolve, reject, onProgress } = pendingRequests.get(data.id);
  if (data.progress) return onProgress(data.progress);
  pendingRequests.delete(data.id);
  return data.error ? reject(new Error(data.error)) : resolve(data.result);
}

function setStatus(text, progress = 0) {
  $("status").textContent = text;
  if (progress === null) $("progress").removeAttribute("value"); // unknown progress: the bar shows activity only
  else $("progress").value = progress; // 0 to 1
}

async function start() {
  if ("serviceWorker" in navigator) {
    await startServiceWorker();
    if (!crossOriginIsolated && !sessionStorage.reloaded) { // once reloaded through it, the page may use threads
      sessionStorage.reloaded = "yes";
      location.reload();
      return;
    }
  }
  worker = new Worker("worker.js", { type: "module" });
  worker.onmessage = receiveMessage;
  setStatus("Loading the model …", null);
  modelInfo = await request("load", {}, ({ bytes }) => setStatus(`Loading the model … ${(bytes / 1e6).toFixed(1)} MB`, null));
  $("file").disabled = false;
  setStatus(`${modelSummary()}. Drop a photograph.`);
}

/** Register the service worker and wait until it is active, so that it caches every file fetched from then on. */
async function startServiceWorker() {
  await navigator.serviceWorker.register("service-worker.js");
  const { active } = await navigator.serviceWorker.ready;
  while (active.state === "activating") await new Promise((resolve) => active.addEventListener("statechange", resolve, { once: true }));
}

function modelSummary() {
  const { bytes, imageSize, threads } = modelInfo;
  return `Model ${(bytes / 1e6).toFixed(1)} MB at ${imageSize} px, ${threads} thread${threads > 1 ? "s" : ""}`;
}

async function openPhoto(file) {
  setStatus("Looking at the photograph …", null);
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  const fullSize = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
  fullSize.fillStyle = "white"; // behind transparent parts
  fullSize.fillRect(0, 0, bitmap.width, bitmap.height);
  fullSize.drawImage(bitmap, 0, 0);
  size = frameSize(bitmap.height, bitmap.width);
  for (const canvas of [$("photo"), $("masks")]) [canvas.height, canvas.width] = size;
  $("photo").getContext("2d").drawImage(bitmap, 0, 0, size[1], size[0]);
  $("hint").style.display = "none";
  clear();
  for (const button of buttons) button.disabled = true;
  const photo = fullSize.getImageData(0, 0, bitmap.width, bitmap.height);
  const { milliseconds } = await request("encode", { photo });
  for (const button of buttons) button.disabled = false;
  setStatus(`${modelSummary()}. Looked at in ${Math.round(milliseconds)} ms. Click on a thing.`);
}

function clear() {
  points = [];
  latestPrompt++;
  $("masks").getContext("2d").clearRect(0, 0, size[1], size[0]);
}

async function showMask() {
  const thisPrompt = ++latestPrompt;
  setStatus("…", null);
  const { logits, iou, milliseconds } = await request("predict", { points });
  if (thisPrompt !== latestPrompt) return;
  drawMasks([logits]);
  setStatus(`Mask in ${Math.round(milliseconds)} ms, expected IoU ${iou.toFixed(2)}.`);
}

async function showEverything() {
  const thisPrompt = ++latestPrompt;
  setStatus("Segmenting everything …", null);
  const onProgress = ({ fraction }) =>
    thisPrompt === latestPrompt && setStatus(`Segmenting everything … ${Math.round(100 * fraction)}%`, fraction);
  const content = { height: size[0], width: size[1], pointsPerSide: POINTS_PER_SIDE };
  const { masks, milliseconds } = await request("segmentEverything", content, onProgress);
  if (thisPrompt !== latestPrompt) return;
  points = [];
  drawMasks(masks.map(({ logits }) => logits));
  setStatus(`${masks.length} masks in ${(milliseconds / 1000).toFixed(1)} s.`);
}

/** Draw masks, given as logits [256, 256], large ones first so that small ones lie over them; then the prompt. */
function drawMasks(allLogits) {
  const [height, width] = size;
  const pixels = new ImageData(width, height);
  const masks = allLogits.map((logits) => upscaleMask(logits, height, width));
  const masksByArea = masks.map((mask) => [mask.reduce((a, b) => a + b, 0), mask]).sort((a, b) => b[0] - a[0]);
  masksByArea.forEach(([, mask], number) => {
    const colour = [...COLOURS[number % COLOURS.length], 140];
    for (let i = 0; i < mask.length; i++) if (mask[i]) pixels.data.set(colour, 4 * i);
  });
  const context = $("masks").getContext("2d");
  context.putImageData(pixels, 0, 0);
  for (const { x, y, label } of points) {
    if (label > 1) continue; // a corner of the box
    context.beginPath();
    context.arc(x, y, 6, 0, 2 * Math.PI);
    context.fillStyle = label ? "#0a0" : "#d00";
    context.fill();
    context.strokeStyle = "#fff";
    context.lineWidth = 2;
    context.stroke();
  }
  const corners = points.filter(({ label }) => label > 1);
  if (corners.length) drawBox(...corners);
}

function drawBox(a, b) {
  const context = $("masks").getContext("2d");
  context.strokeStyle = "#0a0";
  context.lineWidth = 2;
  context.strokeRect(a.x, a.y, b.x - a.x, b.y - a.y);
}

/** Return where a pointer event is, {x, y} in pixels of the frame; the canvas may be displayed at a smaller size. */
function framePosition(event) {
  const area = $("masks").getBoundingClientRect();
  const [height, width] = size;
  const inside = (value, end) => Math.min(end, Math.max(0, value));
  const x = ((event.clientX - area.left) * width) / area.width;
  const y = ((event.clientY - area.top) * height) / area.height;
  return { x: inside(x, width), y: inside(y, height) };
}

function isDrag(from, to) {
  return Math.max(Math.abs(from.x - to.x), Math.abs(from.y - to.y)) >= MIN_DRAG;
}

const reportErrors = (action) => (...args) => action(...args).catch((error) => setStatus(`That failed: ${error.message}`));
const openPhotoOrReport = reportErrors(openPhoto);
const showMaskOrReport = reportErrors(showMask);

function isExcluding(event) {
  return event.shiftKey || event.button === 2 || $("exclude").checked; // a touch screen has only the checkbox
}

$("masks").addEventListener("pointerdown", (event) => {
  if ($("clear").disabled) return; // no photograph yet
  dragStart = framePosition(event);
  $("masks").setPointerCapture(event.pointerId); // a box may end outside
});
$("masks").addEventListener("pointercancel", () => (dragStart = undefined));
$("masks").addEventListener("pointermove", (event) => {
  if (!dragStart) return;
  const position = framePosition(event);
  if (!isDrag(dragStart, position)) return;
  drawMasks([]);
  drawBox(dragStart, position);
});
$("masks").addEventListener("pointerup", (event) => {
  if (!dragStart) return;
  const position = framePosition(event);
  if (isDrag(dragStart, position)) {
    const [left, right] = [dragStart.x, position.x].sort((a, b) => a - b);
    const [top, bottom] = [dragStart.y, position.y].sort((a, b) => a - b);
    points = [{ x: left, y: top, label: 2 }, { x: right, y: bottom, label: 3 }];
  } else {
    if (points.length === modelInfo.maxPoints) points = []; // no room for another: start again
    points.unshift({ ...position, label: isExcluding(event) ? 0 : 1 }); // before a box, as in SAM
  }
  dragStart = undefined;
  showMaskOrReport();
});
$("masks").addEventListener("contextmenu", (event) => event.preventDefault());
$("file").addEventListener("change", (event) => event.target.files[0] && openPhotoOrReport(event.target.files[0]));
$("stage").addEventListener("dragover", (event) => {
  event.preventDefault();
  $("stage").classList.add("over");
});
$("stage").addEventListener("dragleave", () => $("stage").classList.remove("over"));
$("stage").addEventListener("drop", (event) => {
  event.preventDefault();
  $("stage").classList.remove("over");
  if (modelInfo && event.dataTransfer.files[0]) openPhotoOrReport(event.dataTransfer.files[0]);
});
$("everything").addEventListener("click", reportErrors(showEverything));
$("clear").addEventListener("click", () => {
  clear();
  setStatus(modelSummary());
});
$("save").addEventListener("click", () => {
  $("masks").toBlob((blob) => {
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: "mask.png" });
    link.click();
  });
});
reportErrors(start)();
