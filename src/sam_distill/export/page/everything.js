// Segment everything: a grid of clicks, the good masks of each, and of those that show the same thing the best.

import { FRAME, frameSize, LOW_RES } from "./pixels.js";

const LEAST_IOU = 0.8; // that the model expects of a mask
const LEAST_STABILITY = 0.85; // IoU of the mask at logits of +1 and -1
const SAME = 0.7; // IoU of two masks that show the same thing

/** Masks as logits, the best first. `progress` is called with how far it is, 0 to 1. */
export async function everything(model, height, width, perSide, progress) {
  const [h, w] = frameSize(height, width);
  const found = [];
  for (let i = 0; i < perSide * perSide; i++) {
    const x = (((i % perSide) + 0.5) / perSide) * w;
    const y = ((Math.floor(i / perSide) + 0.5) / perSide) * h;
    const { masks, iou } = await model.ask([{ x, y, label: 1 }]);
    for (const which of [1, 2, 3]) {
      const logits = masks[which];
      if (iou[which] >= LEAST_IOU && stability(logits) >= LEAST_STABILITY) found.push({ logits, iou: iou[which] });
    }
    progress((i + 1) / (perSide * perSide));
  }
  found.sort((a, b) => b.iou - a.iou);
  const kept = [];
  for (const candidate of found) {
    if (kept.every((other) => overlap(candidate.logits, other.logits, h, w) < SAME)) kept.push(candidate);
  }
  return kept;
}

function stability(logits) {
  let sure = 0;
  let perhaps = 0;
  for (const value of logits) {
    if (value > 1) sure++;
    if (value > -1) perhaps++;
  }
  return perhaps ? sure / perhaps : 0;
}

/** IoU of two masks where the photograph is. */
function overlap(a, b, height, width) {
  const [rows, columns] = [height, width].map((side) => Math.ceil((side * LOW_RES) / FRAME));
  let both = 0;
  let either = 0;
  for (let y = 0; y < rows; y++) {
    for (let i = y * LOW_RES; i < y * LOW_RES + columns; i++) {
      both += a[i] > 0 && b[i] > 0;
      either += a[i] > 0 || b[i] > 0;
    }
  }
  return either ? both / either : 1;
}
