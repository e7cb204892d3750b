// The two graphs in ONNX Runtime, as contract.json describes them.

import * as ort from "./runtime/ort.wasm.min.mjs";
import { encoderInput, LOW_RES } from "./pixels.js";

ort.env.wasm.wasmPaths = new URL("./runtime/", import.meta.url).href;
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;

const NOT_A_POINT = -1;

export class Model {
  /** progress: called with the bytes that have come, of both files together. */
  static async load(progress) {
    const model = new Model();
    model.contract = await (await fetch("contract.json")).json();
    const files = [];
    for (const graph of ["encoder", "decoder"]) files.push(await download(model.contract[graph].file, progress));
    model.bytes = files.reduce((sum, file) => sum + file.length, 0);
    [model.encoder, model.decoder] = [await ort.InferenceSession.create(files[0]), await ort.InferenceSession.create(files[1])];
    model.threads = ort.env.wasm.numThreads;
    return model;
  }

  /** Look at a photograph (ImageData); `ask` is then about it. */
  async see(photograph) {
    const side = this.contract.image_size;
    const image = new ort.Tensor("float32", encoderInput(photograph, side), [1, 3, side, side]);
    this.embeddings = (await this.encoder.run({ image })).image_embeddings;
  }

  /**
   * points: [{x, y, label}] in the frame, labels as SAM has them: 1, 0, and 2 and 3 for a box's corners.
   * Returns four masks as logits [256, 256], and the IoU that the model expects of each.
   */
  async ask(points) {
    const maxPoints = this.contract.points;
    const coordinates = new Float32Array(maxPoints * 2);
    const labels = new Float32Array(maxPoints).fill(NOT_A_POINT);
    points.forEach(({ x, y, label }, i) => {
      coordinates.set([x, y], 2 * i);
      labels[i] = label;
    });
    const tensor = (data, shape) => new ort.Tensor("float32", data, shape);
    const answer = await this.decoder.run({
      image_embeddings: this.embeddings,
      point_coords: tensor(coordinates, [1, maxPoints, 2]),
      point_labels: tensor(labels, [1, maxPoints]),
      mask_input: tensor(new Float32Array(LOW_RES * LOW_RES), [1, 1, LOW_RES, LOW_RES]),
      has_mask_input: tensor(new Float32Array(1), [1]),
    });
    const area = LOW_RES * LOW_RES;
    const logits = answer.low_res_masks.data;
    const masks = [0, 1, 2, 3].map((i) => logits.slice(i * area, (i + 1) * area));
    return { masks, iou: Array.from(answer.iou_predictions.data) };
  }

  /** The one mask to show: of a single click, which is ambiguous, the best of three. */
  async best(points) {
    const { masks, iou } = await this.ask(points);
    const ambiguous = points.length === 1;
    const which = ambiguous ? iou.indexOf(Math.max(...iou.slice(1)), 1) : 0;
    return { logits: masks[which], iou: iou[which] };
  }
}

async function download(file, progress) {
  const response = await fetch(file);
  if (!response.ok) throw new Error(`${file}: ${response.status} ${response.statusText}`);
  const parts = [];
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return new Uint8Array(await new Blob(parts).arrayBuffer());
    parts.push(value);
    progress(value.length);
  }
}
