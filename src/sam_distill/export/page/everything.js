// "Segment everything": prompt with a grid of clicks, keep the good masks, and only the best of several duplicates.

import { FRAME, frameSize, LOW_RES } from "./pixels.js";

const MIN_IOU = 0.8; // masks with a lower predicted IoU are dropped
const MIN_STABILITY = 0.85; // masks with a lower stability score are dropped: IoU of the masks at cutoffs of +1 and -1
const DUPLICATE_IOU = 0.7; // two masks with at least this IoU show the same object: the better one is kept

/**
 * Return the masks in the photograph last encoded, [{logits: [256, 256], iou}], the highest predicted IoU first.
 * height, width: of the photograph, at any scale. onProgress: called with the fraction that is done, 0 to 1.
 */
export async function segmentEverything(model, height, width, pointsPerSide, onProgress) {
  const [h, w] = frameSize(height, width);
  const candidates = [];
  for (let i = 0; i < pointsPerSide * pointsPerSide; i++) {
    const x = (((i % pointsPerSide) + 0.5) / pointsPerSide) * w;
    const y = ((Math.floor(i / pointsPerSide) + 0.5) / pointsPerSide) * h;
    const { masks, iou } = await model.decode([{ x, y, label: 1 }]);
    for (const k of [1, 2, 3]) { // the three masks for a single click; mask 0 is for boxes and several points
      const logits = masks[k];
      if (iou[k] >= MIN_IOU && stabilityScore(logits) >= MIN_STABILITY) candidates.push({ logits, iou: iou[k] });
    }
    onProgress((i + 1) / (pointsPerSide * pointsPerSide));
  }
  candidates.sort((a, b) => b.iou - a.iou);
  const kept = [];
  for (const candidate of candidates) {
    if (kept.every((better) => maskIou(candidate.logits, better.logits, h, w) < DUPLICATE_IOU)) kept.push(candidate);
  }
  return kept;
}

function stabilityScore(logits) {
  let intersection = 0;
  let union = 0;
  for (const value of logits) {
    if (value > 1) intersection++;
    if (value > -1) union++;
  }
  return union ? intersection / union : 0;
}

/** Return the IoU of two masks (logits) in the photograph, height x width frame pixels; 1 if both are empty there. */
function maskIou(a, b, height, width) {
  const [rows, columns] = [height, width].map((side) => Math.ceil((side * LOW_RES) / FRAME));
  let intersection = 0;
  let union = 0;
  for (let y = 0; y < rows; y++) {
    for (let i = y * LOW_RES; i < y * LOW_RES + columns; i++) {
      intersection += a[i] > 0 && b[i] > 0;
      union += a[i] > 0 || b[i] > 0;
    }
  }
  return union ? intersection / union : 1;
}
