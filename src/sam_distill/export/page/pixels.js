// From a photograph to the encoder's input, and from logits to a mask: resized, padded and up-sampled as in Python.

export const FRAME = 1024; // side of the square frame; the resized photograph lies in its top left corner
export const LOW_RES = 256; // side of the decoder's masks, which cover the whole frame
export const PIXEL_MEAN = [123.675, 116.28, 103.53]; // RGB, SAM's mean colour; fills the frame around the photograph

/** Return [height, width] of a photograph in the frame: long side 1024, the other rounded half up, at least 1. */
export function frameSize(height, width) {
  const scale = FRAME / Math.max(height, width);
  return [height, width].map((side) => Math.max(1, Math.floor(side * scale + 0.5)));
}

/**
 * Return {first, weights} for each of the `to` pixels of a resized row: the index of the first of its `from` source
 * pixels and the weights from there on (sum 1). They form a triangle, wider when shrinking: antialiased, as in Pillow.
 */
function resizeWeights(from, to) {
  const scale = from / to;
  const radius = Math.max(1, scale);
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.floor(centre - radius + 0.5));
    const end = Math.min(from, Math.floor(centre + radius + 0.5));
    const weights = [];
    for (let k = first; k < end; k++) weights.push(Math.max(0, 1 - Math.abs(k + 0.5 - centre) / radius));
    const sum = weights.reduce((a, b) => a + b);
    return { first, weights: weights.map((weight) => weight / sum) };
  });
}

/** Resize (antialiased bilinear) the first 3 channels: [height, width, channels] -> [toHeight, toWidth, 3] floats. */
export function resize(source, channels, height, width, toHeight, toWidth) {
  const narrowed = new Float32Array(height * toWidth * 3); // rows are resized first, then columns
  resizeWeights(width, toWidth).forEach(({ first, weights }, x) => {
    for (let y = 0; y < height; y++) {
      for (let c = 0; c < 3; c++) {
        let sum = 0;
        for (let k = 0; k < weights.length; k++) sum += weights[k] * source[(y * width + first + k) * channels + c];
        narrowed[(y * toWidth + x) * 3 + c] = sum;
      }
    }
  });
  const result = new Float32Array(toHeight * toWidth * 3);
  const row = toWidth * 3; // values in a row of the result
  resizeWeights(height, toHeight).forEach(({ first, weights }, y) => {
    for (let k = 0; k < weights.length; k++) {
      for (let i = 0; i < row; i++) result[y * row + i] += weights[k] * narrowed[(first + k) * row + i];
    }
  });
  return result;
}

/** ImageData (RGBA) of any size -> encoder input [3, side, side] floats: RGB, 0 to 255, padded with PIXEL_MEAN. */
export function encoderInput({ data, height, width }, side) {
  const [h, w] = frameSize(height, width);
  const resized = resize(data, 4, height, width, h, w);
  let frame = new Float32Array(FRAME * FRAME * 3);
  for (let y = 0; y < FRAME; y++) {
    for (let x = 0; x < FRAME; x++) {
      for (let c = 0; c < 3; c++) {
        frame[(y * FRAME + x) * 3 + c] = y < h && x < w ? Math.round(resized[(y * w + x) * 3 + c]) : PIXEL_MEAN[c];
      }
    }
  }
  if (side !== FRAME) frame = resize(frame, 3, FRAME, FRAME, side, side);
  const planes = new Float32Array(frame.length);
  const area = side * side;
  for (let i = 0; i < area; i++) for (let c = 0; c < 3; c++) planes[c * area + i] = frame[i * 3 + c];
  return planes;
}

/** Up-sample logits [256, 256] bilinearly to the frame -> mask [height, width] (its top left part), 1 where above 0. */
export function upscaleMask(logits, height, width) {
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

/** Return the two low-res cells next to a frame pixel along one axis, and the weight of the second, 0 to 1. */
function neighbours(pixel) {
  const position = Math.max(0, ((pixel + 0.5) * LOW_RES) / FRAME - 0.5);
  const first = Math.floor(position);
  return [first, Math.min(first + 1, LOW_RES - 1), position - first];
}
