// The model works here, so that the page stays alive. Each request {id, task, ...} is answered {id, ...} or {id, error}.

import { everything } from "./everything.js";
import { Model } from "./model.js";

let model;
let last = Promise.resolve(); // one request at a time

const tasks = {
  async load(_, told) {
    let bytes = 0;
    model = await Model.load((more) => told({ bytes: (bytes += more) }));
    return { bytes: model.bytes, threads: model.threads, side: model.contract.image_size, points: model.contract.points };
  },
  async see({ photograph }) {
    await model.see(photograph);
  },
  async ask({ points }) {
    return await model.best(points);
  },
  async everything({ height, width, perSide }, told) {
    return { masks: await everything(model, height, width, perSide, (done) => told({ done })) };
  },
};

self.onmessage = ({ data }) => {
  last = last.then(async () => {
    const started = performance.now();
    try {
      const answer = await tasks[data.task](data, (progress) => self.postMessage({ id: data.id, progress }));
      self.postMessage({ id: data.id, answer: { ...answer, milliseconds: performance.now() - started } });
    } catch (error) {
      self.postMessage({ id: data.id, error: String(error) });
    }
  });
};
