"""Peer: the published network, built from its description as a Keras graph on TensorFlow, without PyTorch."""

import math
import os
import time
from collections.abc import Callable, Mapping

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np
import tensorflow

BATCH_SIZES = tuple(1 << power for power in range(10, 19))
LEAKY_SLOPE = 0.3

# `Model.predict` of Keras, the graph called directly, and the graph compiled by XLA, which the published program does
# not use.
MODES = ("predict", "graph", "xla")


class Peer:
    """
    Network of one role.

    Args:
        weights (`Mapping[str, np.ndarray]`):
            State dict of a `KNOWNModel` of the published sizes.
        role (`str`):
            Role of the network.
        mode (`str`):
            One of `MODES`.
        threads (`int`):
            Threads of TensorFlow, within and between operations.
    """

    def __init__(self, weights: Mapping[str, np.ndarray], role: str, mode: str, threads: int) -> None:
        tensorflow.config.threading.set_intra_op_parallelism_threads(threads)
        tensorflow.config.threading.set_inter_op_parallelism_threads(threads)
        self.versions = {"tensorflow": tensorflow.__version__, "keras": keras.__version__}
        self.model = keras_model(weights, f"networks.{role}.")
        self.mode = mode
        self._graph: Callable = tensorflow.function(self._call, jit_compile=mode == "xla")

    def residual(self, history: np.ndarray, batch_size: int) -> np.ndarray:
        """Map `(N, S)` to `(N,)`, `batch_size` rows at a time."""
        if self.mode == "predict":
            inputs = [history, np.diff(history)]
            return self.model.predict(inputs, batch_size=batch_size, verbose=0)[:, 0]
        residual = np.empty(len(history), np.float32)
        for start in range(0, len(history), batch_size):
            batch = tensorflow.constant(history[start : start + batch_size])
            residual[start : start + batch_size] = self._graph(batch).numpy()
        return residual

    def best_batch_size(self, history: np.ndarray) -> int:
        """Return the fastest of `BATCH_SIZES`, by the best of three runs each."""
        durations = {}
        for batch_size in BATCH_SIZES:
            self.residual(history, batch_size)  # traces the graph of this size
            durations[batch_size] = math.inf
            for _ in range(3):
                start = time.perf_counter()
                self.residual(history, batch_size)
                durations[batch_size] = min(durations[batch_size], time.perf_counter() - start)
            if batch_size >= len(history):
                break
        return min(durations, key=durations.__getitem__)

    def _call(self, history: tensorflow.Tensor) -> tensorflow.Tensor:
        return self.model([history, history[:, 1:] - history[:, :-1]], training=False)[:, 0]


def keras_model(weights: Mapping[str, np.ndarray], prefix: str) -> keras.Model:
    """Build the model from history `(N, S)` and differences `(N, S - 1)` to the residual `(N, 1)`."""

    def dense(name: str, inputs: keras.KerasTensor, activation: str | None = None) -> keras.KerasTensor:
        kernel, bias = weights[f"{prefix}{name}.weight"].T, weights[f"{prefix}{name}.bias"]
        layer = keras.layers.Dense(len(bias), activation=activation)
        outputs = layer(inputs)
        layer.set_weights([kernel, bias])
        return outputs

    def stream(name: str, inputs: keras.KerasTensor) -> keras.KerasTensor:
        hidden = dense(f"{name}.expand", inputs)
        bottleneck = dense(f"{name}.activation.squeeze", hidden, "relu")
        shift = dense(f"{name}.activation.shift", bottleneck)
        scale = dense(f"{name}.activation.scale", bottleneck)
        exponent = dense(f"{name}.activation.exponent", bottleneck)
        activated = shift + scale * keras.ops.exp(exponent * hidden)
        contracted = dense(f"{name}.contract", activated)
        return keras.layers.LeakyReLU(negative_slope=LEAKY_SLOPE)(contracted)

    num_states = weights[f"{prefix}history_stream.expand.weight"].shape[1]
    history, differences = keras.Input((num_states,)), keras.Input((num_states - 1,))
    streams = [stream("history_stream", history), stream("difference_stream", differences)]
    return keras.Model([history, differences], dense("head", keras.layers.Concatenate()(streams), "tanh"))
