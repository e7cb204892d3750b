// Web worker that runs the model, so that the page stays responsive. A request is {id, task, ...content}; the reply is
// {id, result} or {id, error: string}; before it come {id, progress} messages, the arguments of the onProgress calls.

import { segmentEverything } from "./everything.js";
import { Model } from "./model.js";

let model;
let queue = Promise.resolve(); // resolves when all earlier requests are done: one request runs at a time

const tasks = {
  async load(_, onProgress) {
    let bytes = 0;
    model = await Model.load((chunkBytes) => onProgress({ bytes: (bytes += chunkBytes) }));
    const { image_size: imageSize, points: maxPoints } = model.contract;
    return { bytes: model.bytes, threads: model.threads, imageSize, maxPoints };
  },
  async encode({ photo }) {
    await model.encode(photo);
  },
  async predict({ points }) {
    return await model.predict(points);
  },
  async segmentEverything({ height, width, pointsPerSide }, onProgress) {
    const onFraction = (fraction) => onProgress({ fraction });
    return { masks: await segmentEverything(model, height, width, pointsPerSide, onFraction) };
  },
};

self.onmessage = ({ data }) => {
  queue = queue.then(async () => {
    const started = performance.now();
    try {
      const result = await tasks[data.task](data, (progress) => self.postMessage({ id: data.id, progress }));
      self.postMessage({ id: data.id, result: { ...result, milliseconds: performance.now() - started } });
    } catch (error) {
      self.postMessage({ id: data.id, error: String(error) });
    }
  });
};
