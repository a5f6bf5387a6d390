"""Contestants of `prediction.py`, one process each: kernels in PyTorch, the peer, and the peak of the machine.

Libraries are imported in these processes only. Imports, thread pools, compilers, memory and crashes of one contestant
do not affect the others.
"""

import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory import current_memory, peak_memory

if TYPE_CHECKING:
    import numpy as np

CHECKED_ROWS = 1 << 16
ROLES = ("conv", "fc", "bias")
TIMED_ROLE = "fc"
SHORTEST_PRODUCT = 0.05  # seconds

Run = Callable[[], dict[str, Any]]


class Contestant:
    """
    Process that prepares a measurement and repeats it on request.

    Args:
        prepare (`Callable`):
            Function to call in the process. It returns the measurement and its `properties`.
        arguments:
            Picklable arguments of `prepare`.

    Attributes:
        properties (`dict[str, Any]`):
            Properties that `prepare` returned.
        failure (`str`, *optional*):
            Reason why it cannot run, in one line.
        details (`str`):
            Traceback of the failure.
    """

    def __init__(self, prepare: Callable[..., tuple[Run, dict[str, Any]]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.failure: str | None = None
        self.details = ""
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, prepare, arguments))
        self._process.start()
        theirs.close()
        self.properties = self._receive()

    def run(self) -> dict[str, Any]:
        """Return one measurement, or an empty dictionary after a failure."""
        if self.failure is None:
            self._connection.send("run")
            return self._receive()
        return {}

    def __enter__(self) -> "Contestant":
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            self._process.terminate()
        self._connection.close()
        self._process.join()

    def _receive(self) -> dict[str, Any]:
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            self.failure = self.details = f"its process ended with code {self._process.exitcode}"
            return {}
        if "failure" in answer:
            self.failure, self.details = answer["failure"], answer["details"]
            return {}
        return answer


def _serve(connection: Connection, prepare: Callable[..., tuple[Run, dict[str, Any]]], arguments: tuple) -> None:
    try:
        run, properties = prepare(*arguments)
        connection.send(properties)
        while connection.recv():
            connection.send(run())
    except EOFError:
        pass  # the benchmark closed the connection
    except Exception as error:  # the other contestants continue without this one
        reason = " ".join(str(error).split()) or type(error).__name__
        connection.send({"failure": reason, "details": traceback.format_exc()})


def prepare_inputs(
    folder: Path, peer_weights: Path | None, rows: int, threads: int, sizes: list[str], disk: Path
) -> tuple[Run, dict[str, Any]]:
    """Check the disk and write the shared inputs: KNOWN, a history, and the residuals of eager PyTorch."""
    import numpy as np
    import torch
    import transformers
    from trajectories import plan

    from know_hf import KNOWNModel
    from know_hf.checkpoint import check_free_disk
    from know_hf.prediction import SHIPPED_KNOWN

    plans = {size: plan(size) for size in sizes}
    check_free_disk(disk, max((content["disk_bytes"] for content in plans.values()), default=0))
    torch.set_num_threads(threads)
    model = KNOWNModel.from_keras(peer_weights) if peer_weights else KNOWNModel.from_pretrained(SHIPPED_KNOWN)
    model.save_pretrained(folder / "known")
    np.savez(folder / "weights.npz", **{name: weight.numpy() for name, weight in model.state_dict().items()})
    generator = torch.Generator().manual_seed(0)
    # As in trained networks: weights of about 0.05 that move by about one percent per stage.
    history = 0.05 * torch.randn(rows, 1, generator=generator)
    history = history + 0.0005 * torch.randn(rows, model.config.num_states, generator=generator).cumsum(dim=1)
    np.save(folder / "history.npy", history.numpy())
    with torch.inference_mode():
        expected = {role: model(history=history[:CHECKED_ROWS], role=role).residual.numpy() for role in ROLES}
    np.savez(folder / "expected.npz", **expected)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    return dict, {"plans": plans, "config": model.config.to_dict(), "versions": versions}


def prepare_kernel(kernel: str, folder: Path, device: str, threads: int, seconds: float) -> tuple[Run, dict[str, Any]]:
    """Prepare a kernel of `know_hf.known.kernels`."""
    import numpy as np
    import torch

    from know_hf import KNOWNModel
    from know_hf.known.kernels import residual

    torch.set_num_threads(threads)
    model = KNOWNModel.from_pretrained(folder / "known").to(device)
    # Contiguous per state, as prediction reads it.
    history = torch.from_numpy(np.load(folder / "history.npy")).to(device).T.contiguous().T
    base = _memory(device, peak=False)

    @torch.inference_mode()
    def compute(role: str, rows: int) -> np.ndarray:
        return residual(model, history[:rows], role=role, kernel=kernel).float().cpu().numpy()

    @torch.inference_mode()
    def once() -> None:
        residual(model, history, role=TIMED_ROLE, kernel=kernel)
        if device != "cpu":
            torch.cuda.synchronize()

    difference = largest_difference(compute, folder)
    return repeat(once, len(history), seconds, device, base), {"difference": difference}


def prepare_batch_size(mode: str, folder: Path, threads: int) -> tuple[Run, dict[str, Any]]:
    """Find the fastest batch size of the peer, in a separate process because other sizes take memory."""
    import numpy as np
    from tensorflow_peer import Peer

    peer = Peer(dict(np.load(folder / "weights.npz")), TIMED_ROLE, mode, threads)
    history = np.load(folder / "history.npy")
    return dict, {"batch_size": peer.best_batch_size(history[: 1 << 18]), "versions": peer.versions}


def prepare_peer(mode: str, folder: Path, batch_size: int, threads: int, seconds: float) -> tuple[Run, dict[str, Any]]:
    """Prepare the published network on TensorFlow in one of `tensorflow_peer.MODES`."""
    import numpy as np
    from tensorflow_peer import Peer

    history = np.load(folder / "history.npy")
    weights = dict(np.load(folder / "weights.npz"))
    peers = {role: Peer(weights, role, mode, threads) for role in ROLES}
    base = _memory("cpu", peak=False)

    def compute(role: str, rows: int) -> np.ndarray:
        return peers[role].residual(history[:rows], batch_size)

    difference = largest_difference(compute, folder)
    if difference > 5e-7:
        raise ValueError(f"its outputs differ from eager PyTorch by {difference:.1e}, more than 5e-7")
    run = repeat(lambda: compute(TIMED_ROLE, len(history)), len(history), seconds, "cpu", base)
    return run, {"difference": difference}


def prepare_matrix_product(device: str, threads: int) -> tuple[Run, dict[str, Any]]:
    """Prepare a large square matrix product, whose FLOP/s are the machine's peak."""
    import torch

    torch.set_num_threads(threads)

    def make_products(size: int) -> dict[str, Callable[[], object]]:
        single = torch.randn(size, size, device=device)
        half = single.bfloat16()
        products: dict[str, Callable[[], object]] = {
            "torch.mm": lambda: torch.mm(single, single),
            "bfloat16": lambda: torch.mm(half, half),
        }
        if device == "cpu" and torch.backends.mkldnn.is_available():
            # On AMD CPUs, torch.mm may not use the widest vectors; oneDNN does.
            packed = single.to_mkldnn()
            products["oneDNN"] = lambda: torch.nn.functional.linear(packed, packed)
        return products

    def seconds(product: Callable[[], object], repetitions: int) -> float:
        durations = []
        for _ in range(repetitions):
            start = time.perf_counter()
            product()
            if device != "cpu":
                torch.cuda.synchronize()
            durations.append(time.perf_counter() - start)
        return min(durations)

    # Double the size while all products are quick: CPUs without bfloat16 instructions run it at 1 GFLOP/s.
    size, largest = 128, 2048 if device == "cpu" else 8192
    products = make_products(size)
    while size < largest and all(seconds(product, 2) < SHORTEST_PRODUCT for product in products.values()):
        size *= 2
        products = make_products(size)

    def run() -> dict[str, Any]:
        rates = {name: 2 * size**3 / seconds(product, 6) for name, product in products.items()}
        return rates | {"float32": max(rates["torch.mm"], rates.get("oneDNN", 0))}

    return run, {"device": torch.cuda.get_device_name() if device != "cpu" else ""}


def repeat(function: Callable[[], object], rows: int, seconds: float, device: str, base: int) -> Run:
    """Warm up a function of `rows` rows; return a measurement that calls it for `seconds` seconds, at least once."""
    function()

    def run() -> dict[str, Any]:
        start, calls = time.perf_counter(), 0
        while not calls or time.perf_counter() - start < seconds:
            function()
            calls += 1
        per_row = (time.perf_counter() - start) / (calls * rows)
        return {"seconds": per_row, "memory_bytes": max(0, _memory(device, peak=True) - base)}

    return run


def largest_difference(compute: "Callable[[str, int], np.ndarray]", folder: Path) -> float:
    """Return the largest difference from the residuals of eager PyTorch, over all roles."""
    import numpy as np

    expected = np.load(folder / "expected.npz")
    return max(float(np.abs(compute(role, CHECKED_ROWS) - expected[role]).max()) for role in ROLES)


def _memory(device: str, peak: bool) -> int:
    """Return current or peak memory of this process or of the GPU, in bytes."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    return peak_memory() if peak else current_memory()
