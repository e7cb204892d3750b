// The image encoder and the mask decoder in ONNX Runtime; contract.json describes their inputs and outputs.

import * as ort from "./runtime/ort.wasm.min.mjs";
import { encoderInput, LOW_RES } from "./pixels.js";

ort.env.wasm.wasmPaths = new URL("./runtime/", import.meta.url).href;
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;

const NOT_A_POINT = -1; // label of unused places in point_labels

export class Model {
  /** Download and open both graphs. onProgress: called with the size in bytes of each chunk of either file. */
  static async load(onProgress) {
    const model = new Model();
    model.contract = await (await fetch("contract.json")).json();
    const files = [];
    for (const graph of ["encoder", "decoder"]) files.push(await download(model.contract[graph].file, onProgress));
    model.bytes = files.reduce((sum, file) => sum + file.length, 0);
    [model.encoder, model.decoder] = [await ort.InferenceSession.create(files[0]), await ort.InferenceSession.create(files[1])];
    model.threads = ort.env.wasm.numThreads;
    return model;
  }

  /** Encode a photograph (ImageData, any size) and keep its embedding [1, 256, 64, 64] for `decode` and `predict`. */
  async encode(photo) {
    const side = this.contract.image_size;
    const image = new ort.Tensor("float32", encoderInput(photo, side), [1, 3, side, side]);
    this.embeddings = (await this.encoder.run({ image })).image_embeddings;
  }

  /**
   * Return four masks for a prompt, {masks: 4 Float32Array [256, 256] of logits, iou: their 4 predicted IoUs}.
   * points: [{x, y, label}], at most contract.points, in pixels of the photograph with its long side at 1024.
   * label: as in SAM, 1 foreground, 0 background, 2 and 3 the top left and bottom right corners of a box.
   */
  async decode(points) {
    const maxPoints = this.contract.points;
    const coordinates = new Float32Array(maxPoints * 2);
    const labels = new Float32Array(maxPoints).fill(NOT_A_POINT);
    points.forEach(({ x, y, label }, i) => {
      coordinates.set([x, y], 2 * i);
      labels[i] = label;
    });
    const tensor = (data, shape) => new ort.Tensor("float32", data, shape);
    const outputs = await this.decoder.run({
      image_embeddings: this.embeddings,
      point_coords: tensor(coordinates, [1, maxPoints, 2]),
      point_labels: tensor(labels, [1, maxPoints]),
      mask_input: tensor(new Float32Array(LOW_RES * LOW_RES), [1, 1, LOW_RES, LOW_RES]),
      has_mask_input: tensor(new Float32Array(1), [1]),
    });
    const area = LOW_RES * LOW_RES;
    const logits = outputs.low_res_masks.data;
    const masks = [0, 1, 2, 3].map((i) => logits.slice(i * area, (i + 1) * area));
    return { masks, iou: Array.from(outputs.iou_predictions.data) };
  }

  /**
   * Return the one mask to show for a prompt (as in `decode`), {logits: Float32Array [256, 256], iou}: mask 0, or
   * for a single click, which may mean a part or the whole, the one of masks 1 to 3 with the highest predicted IoU.
   */
  async predict(points) {
    const { masks, iou } = await this.decode(points);
    const best = points.length === 1 ? iou.indexOf(Math.max(...iou.slice(1)), 1) : 0;
    return { logits: masks[best], iou: iou[best] };
  }
}

async function download(file, onProgress) {
  const response = await fetch(file);
  if (!response.ok) throw new Error(`${file}: ${response.status} ${response.statusText}`);
  const chunks = [];
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return new Uint8Array(await new Blob(chunks).arrayBuffer());
    chunks.push(value);
    onProgress(value.length);
  }
}
