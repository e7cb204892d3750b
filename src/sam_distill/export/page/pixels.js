// Pixels in and masks out: the same resize, frame and up-sampling as in Python.

export const FRAME = 1024; // the photograph lies in the top left corner of a square of this side
export const LOW_RES = 256; // side of the decoder's masks
export const MEAN = [123.675, 116.28, 103.53]; // the colour of the padding

/** [height, width] of a photograph with its long side resized to the frame. */
export function frameSize(height, width) {
  const scale = FRAME / Math.max(height, width);
  return [height, width].map((side) => Math.max(1, Math.floor(side * scale + 0.5)));
}

/** For each pixel of the result, the pixels of the source that it is made of: a triangle as wide as the reduction. */
function mixtures(from, to) {
  const scale = from / to;
  const reach = Math.max(1, scale);
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.floor(centre - reach + 0.5));
    const last = Math.min(from, Math.floor(centre + reach + 0.5));
    const shares = [];
    for (let k = first; k < last; k++) shares.push(Math.max(0, 1 - Math.abs(k + 0.5 - centre) / reach));
    const sum = shares.reduce((a, b) => a + b);
    return { first, shares: shares.map((share) => share / sum) };
  });
}

/** Antialiased bilinear resize of interleaved pixels with `channels` values each, of which the first three are kept. */
export function resize(source, channels, height, width, toHeight, toWidth) {
  const narrow = new Float32Array(height * toWidth * 3);
  mixtures(width, toWidth).forEach(({ first, shares }, x) => {
    for (let y = 0; y < height; y++) {
      for (let c = 0; c < 3; c++) {
        let sum = 0;
        for (let k = 0; k < shares.length; k++) sum += shares[k] * source[(y * width + first + k) * channels + c];
        narrow[(y * toWidth + x) * 3 + c] = sum;
      }
    }
  });
  const result = new Float32Array(toHeight * toWidth * 3);
  const row = toWidth * 3;
  mixtures(height, toHeight).forEach(({ first, shares }, y) => {
    for (let k = 0; k < shares.length; k++) {
      for (let i = 0; i < row; i++) result[y * row + i] += shares[k] * narrow[(first + k) * row + i];
    }
  });
  return result;
}

/** A photograph's RGBA as the encoder takes it: [3, side, side], 0 to 255, padded with the mean colour. */
export function encoderInput({ data, height, width }, side) {
  const [h, w] = frameSize(height, width);
  const inside = resize(data, 4, height, width, h, w);
  let frame = new Float32Array(FRAME * FRAME * 3);
  for (let y = 0; y < FRAME; y++) {
    for (let x = 0; x < FRAME; x++) {
      for (let c = 0; c < 3; c++) {
        frame[(y * FRAME + x) * 3 + c] = y < h && x < w ? Math.round(inside[(y * w + x) * 3 + c]) : MEAN[c];
      }
    }
  }
  if (side !== FRAME) frame = resize(frame, 3, FRAME, FRAME, side, side);
  const planes = new Float32Array(frame.length);
  const area = side * side;
  for (let i = 0; i < area; i++) for (let c = 0; c < 3; c++) planes[c * area + i] = frame[i * 3 + c];
  return planes;
}

/** Logits [256, 256] of the frame, up-sampled bilinearly; 1 where they are above 0, for its first height x width pixels. */
export function mask(logits, height, width) {
  const result = new Uint8Array(height * width);
  const columns = Array.from({ length: width }, (_, x) => neighbours(x));
  for (let y = 0; y < height; y++) {
    const [top, bottom, down] = neighbours(y);
    for (let x = 0; x < width; x++) {
      const [left, right, across] = columns[x];
      const above = logits[top * LOW_RES + left] * (1 - across) + logits[top * LOW_RES + right] * across;
      const below = logits[bottom * LOW_RES + left] * (1 - across) + logits[bottom * LOW_RES + right] * across;
      result[y * width + x] = above * (1 - down) + below * down > 0 ? 1 : 0;
    }
  }
  return result;
}

/** The two low-res cells around a frame pixel, and how far it lies towards the second. */
function neighbours(pixel) {
  const place = Math.max(0, ((pixel + 0.5) * LOW_RES) / FRAME - 0.5);
  const first = Math.floor(place);
  return [first, Math.min(first + 1, LOW_RES - 1), place - first];
}
