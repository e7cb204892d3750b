"""Run an export's graphs on this device, for scripts/device_check.py. Needs Python 3.10, numpy and the runtime.

Pickled messages: (format, files) once; then (graph's name, arrays) in and (arrays, seconds) out. An array is (shape,
float32 bytes), so that numpy's version does not matter.
"""

import os
import pickle
import sys
import tempfile
import time

import numpy as np


def open_litert(file):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(file, num_threads=os.cpu_count())
    interpreter.allocate_tensors()

    def run(*values):
        for tensor, value in zip(interpreter.get_input_details(), values, strict=True):
            interpreter.set_tensor(tensor["index"], value)
        interpreter.invoke()
        return [interpreter.get_tensor(tensor["index"]) for tensor in interpreter.get_output_details()]

    return run


def open_executorch(file):
    import torch
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(file).load_method("forward")
    return lambda *values: [output.clone().numpy() for output in method.execute([torch.from_numpy(v) for v in values])]


def open_web(file):
    from onnxruntime import InferenceSession

    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in session.get_inputs()]
    return lambda *values: session.run(None, dict(zip(names, values, strict=True)))


READY = b"device_worker.py is ready\n"
OPEN = {"litert": open_litert, "executorch": open_executorch, "web": open_web}


def main():
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a runtime prints must not get between the replies
    replies.write(b"\n" + READY)  # the newline ends a greeting that has none
    replies.flush()
    format, files = pickle.load(requests)
    graphs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            path = os.path.join(folder, name)
            with open(path, "wb") as file:
                file.write(content)
            try:
                graphs[name] = OPEN[format](path)
            except ImportError as error:
                sys.exit(f"error: {error}: install the runtime of format={format} here")
        while True:
            try:
                name, values = pickle.load(requests)
            except EOFError:
                return
            arrays = [np.frombuffer(content, np.float32).reshape(shape).copy() for shape, content in values]
            started = time.perf_counter()
            outputs = graphs[name](*arrays)
            seconds = time.perf_counter() - started
            pickle.dump(([(output.shape, output.astype(np.float32).tobytes()) for output in outputs], seconds), replies)
            replies.flush()


main()
