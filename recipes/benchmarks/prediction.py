"""Speed of prediction with KNOWN, relative to the published network on TensorFlow in the same run.

    python recipes/benchmarks/prediction.py
    python recipes/benchmarks/prediction.py --peer-weights FOLDER --json results.json
    python recipes/benchmarks/prediction.py --device cuda --kernels eager folded triton

First, the function alone: seconds per weight and step of every kernel of KNOWN and of the peer, as medians over
repetitions that take turns, FLOP/s, and their share of the FLOP/s of a large matrix product in the same turns. Then
`predict_overflowed_weights` end to end, in a new process each time, on temporary trajectories of random weights.
Prints Markdown. The peer needs `pip install tensorflow-cpu`.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from contestants import (
    Contestant,
    prepare_batch_size,
    prepare_inputs,
    prepare_kernel,
    prepare_matrix_product,
    prepare_peer,
)
from trajectories import SIZES, prepare_plan, prepare_prediction, prepare_trajectory

PEERS = {"graph": "peer: Keras graph", "predict": "peer: `Model.predict`", "xla": "peer: with XLA"}
STARTED = time.perf_counter()
MAX_SECONDS = 60  # predictions of one size are not repeated after this time


def main(args: argparse.Namespace) -> None:
    threads = args.threads or len(os.sched_getaffinity(0))
    # Libraries read these when the processes below import them.
    os.environ |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    rows = args.rows or (1 << 20 if args.device == "cpu" else 1 << 24)
    results: dict[str, Any] = {"machine": machine(args, threads), "rows": rows, "function": {}, "end_to_end": []}
    with tempfile.TemporaryDirectory(dir=args.output_dir, prefix="benchmark-") as name:
        folder = Path(name)
        log("writing inputs")
        with Contestant(prepare_inputs, folder, args.peer_weights, rows, threads, args.sizes, folder) as inputs:
            stop_at_failure(inputs)
        for size, content in inputs.properties["plans"].items():
            log(f"{size}: {content['parameters']:,} parameters, {content['disk_bytes'] / 1e9:.2f} GB of disk")
        results["machine"]["versions"] |= inputs.properties["versions"]
        results["flops"] = {
            form: flops(inputs.properties["config"], form == "folded") for form in ("published", "folded")
        }
        results["exponentials"] = 2 * inputs.properties["config"]["hidden_size"]
        time_function(args, folder, threads, results)
        if args.json and args.json.exists():
            results["end_to_end"] = json.loads(args.json.read_text())["end_to_end"]
        for size, content in inputs.properties["plans"].items():
            for row in time_prediction(args, size, folder, threads, results["end_to_end"]):
                results["end_to_end"].append(content | row)
                save(results, args.json)
    print(machine_text(results), function_table(results), end_to_end_table(results), sep="\n\n")
    if args.plot:
        plot(results["end_to_end"], args.plot)
    save(results, args.json)


def save(results: dict[str, Any], path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(results, indent=2) + "\n")


def time_function(args: argparse.Namespace, folder: Path, threads: int, results: dict[str, Any]) -> None:
    """Add timings of the function alone to `results`. Contestants take turns, so that all see the same load."""
    with ExitStack() as stack:
        log("preparing the matrix product")
        product = stack.enter_context(Contestant(prepare_matrix_product, args.device, threads))
        if product.failure:
            raise SystemExit(f"not run on {args.device}: {product.failure}")
        contestants = start_contestants(args, folder, threads, stack)
        peaks, runs = [], {name: [] for name in contestants}
        for repetition in range(args.repetitions):
            log(f"the function alone, repetition {repetition + 1} of {args.repetitions}")
            peaks.append(product.run())
            for name, contestant in contestants.items():
                time.sleep(0.2)  # threads of the previous contestant still spin for a while
                if isinstance(contestant, Contestant) and (measured := contestant.run()):
                    runs[name].append(measured)
        results["machine"]["device"] = product.properties["device"] or results["machine"]["device"]
        results["peak"] = {dtype: max(peak[dtype] for peak in peaks) for dtype in peaks[0]}
        for name, contestant in contestants.items():
            failure = contestant if isinstance(contestant, str) else contestant.failure
            if failure:
                results["function"][name] = {"not_run": failure}
                continue
            results["machine"]["versions"] |= contestant.properties.pop("versions", {})
            results["function"][name] = contestant.properties | summary(runs[name])
            form = "published" if name == "eager" or name in PEERS else "folded"
            rate = results["flops"][form] / results["function"][name]["seconds"]
            results["function"][name] |= {"flops_per_second": rate, "share_of_peak": rate / results["peak"]["float32"]}


def start_contestants(
    args: argparse.Namespace, folder: Path, threads: int, stack: ExitStack
) -> dict[str, Contestant | str]:
    """Start a process per kernel and peer; a string is the reason why one cannot run."""
    contestants: dict[str, Contestant | str] = {}
    for kernel in args.kernels:
        log(f"preparing {kernel}")
        contestants[kernel] = stack.enter_context(
            Contestant(prepare_kernel, kernel, folder, args.device, threads, args.seconds)
        )
    for mode in args.peers:
        log(f"preparing the peer: {mode}")
        if find_spec("tensorflow") is None:
            contestants[mode] = "tensorflow is not installed"
        elif args.device != "cpu":
            contestants[mode] = "the peer runs on the CPU only"
        else:
            with Contestant(prepare_batch_size, mode, folder, threads) as search:
                stop_at_failure(search)
            peer = Contestant(prepare_peer, mode, folder, search.properties["batch_size"], threads, args.seconds)
            peer.properties |= search.properties
            contestants[mode] = stack.enter_context(peer)
    return contestants


def time_prediction(
    args: argparse.Namespace, size: str, folder: Path, threads: int, finished: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Write a trajectory, unless there is one, and predict from it in each way, in a new process each time.

    Ways that are finished for this size and device are left out.
    """
    identity = {"size": size, "device": args.device, "threads": threads}
    done = [row["kernel"] for row in finished if row.items() >= identity.items()]
    ways = [way for way in args.predict_with if way not in done]
    if not ways:
        return
    with tempfile.TemporaryDirectory(dir=folder) as name:
        trajectory = Path(args.trajectories or name, size)
        if not trajectory.exists():
            log(f"{size}: writing a trajectory")
            with Contestant(prepare_trajectory, size, trajectory, threads) as writing:
                stop_at_failure(writing)
        for way in ways:
            arguments = (way, args.device, threads)
            log(f"{size}: dry run with {way}")
            with Contestant(prepare_plan, trajectory, folder / "known", *arguments) as planned:
                stop_at_failure(planned)
            runs, start = [], time.perf_counter()
            while len(runs) < args.repetitions and (not runs or time.perf_counter() - start < MAX_SECONDS):
                log(f"{size}: prediction {len(runs) + 1} with {way}")
                with tempfile.TemporaryDirectory(dir=name) as target:
                    paths = (trajectory, folder / "known", Path(target, "predicted"))
                    with Contestant(prepare_prediction, *paths, *arguments) as prediction:
                        runs.append(prediction.run())
                        stop_at_failure(prediction)
            yield identity | {"kernel": way, "runs": len(runs)} | planned.properties | summary(runs)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians, the largest memory and the shortest time."""
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return medians | {
        "best_seconds": min(run["seconds"] for run in runs),
        "memory_bytes": max(run["memory_bytes"] for run in runs),
    }


def flops(config: dict[str, Any], folded: bool) -> int:
    """Return the FLOPs per weight and step, without the exponentials.

    Additions and multiplications count one each, so a layer with n inputs and a bias has 2 n per output; relu, leaky
    relu and tanh count one each. Folded, the first two layers become one layer to the bottleneck, and the additive
    branch one layer from it to the features.
    """
    states, hidden = config["num_states"], config["hidden_size"]
    bottleneck, stream = config["bottleneck_size"], config["stream_size"]
    total = states - 1  # the differences
    for inputs in (states, states - 1):
        total += 2 * inputs * hidden + 2 * hidden * stream + stream
        total += 2 * 2 * bottleneck * hidden + 2 * hidden + bottleneck  # scale, exponent and the products with them
        total += 2 * inputs * bottleneck if folded else 2 * hidden * bottleneck
        total += 2 * bottleneck * stream + stream if folded else 2 * bottleneck * hidden + hidden
    return total + 2 * 2 * stream + 1


def machine(args: argparse.Namespace, threads: int) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "device": names[0] if names else "CPU",
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "versions": {"python": sys.version.split()[0]},
        "command": " ".join(["python", *sys.argv]),
    }


def machine_text(results: dict[str, Any]) -> str:
    settings, peak, flops = results["machine"], results["peak"], results["flops"]
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    return (
        f"{settings['device']}, {settings['threads']} threads, load average before {settings['load_average']:.1f};"
        f" {versions}.\nMatrix product: {peak['float32'] / 1e9:,.0f} GFLOP/s in float32 (torch.mm"
        f" {peak['torch.mm'] / 1e9:,.0f}), {peak['bfloat16'] / 1e9:,.0f} in bfloat16.\nPer weight and step:"
        f" {flops['published']:,} FLOP as published, {flops['folded']:,} folded, and {results['exponentials']}"
        " exponentials."
    )


def function_table(results: dict[str, Any]) -> str:
    from markupsafe import Markup

    from know_hf.markdown import table

    peer = results["function"].get("graph", {}).get("seconds")
    header = [f"function alone, {results['rows']:,} parameters", "seconds per weight (best)", "GFLOP/s"]
    header += ["share of float32 peak", "times the peer", "difference from eager", "extra memory"]
    rows = [header]
    for name, row in results["function"].items():
        batches = f", batches of {row['batch_size']:,}" if "batch_size" in row else ""
        cells = [Markup(PEERS.get(name, name)) + batches]
        if "not_run" in row:
            rows.append([*cells, f"not run: {row['not_run']}", *5 * ["–"]])
            continue
        cells += [f"{row['seconds']:.2e} ({row['best_seconds']:.2e})", f"{row['flops_per_second'] / 1e9:,.0f}"]
        cells += [f"{row['share_of_peak']:.0%}", f"{peer / row['seconds']:.2f}" if peer else "–"]
        rows.append([*cells, f"{row['difference']:.1e}", f"{row['memory_bytes'] / 1e6:,.0f} MB"])
    return table(rows)


def end_to_end_table(results: dict[str, Any]) -> str:
    from know_hf.markdown import table

    header = ["end to end", "kernel", "parameters", "states", "seconds (best, runs)", "seconds per weight"]
    header += ["CPU seconds per weight", "extra memory", "process", "planned", "written", "planned"]
    rows = [header]
    for row in results["end_to_end"]:
        cells = [row["title"], row["kernel"], f"{row['parameters']:,}", row["dtype"]]
        cells += [f"{row['seconds']:.2f} ({row['best_seconds']:.2f}, {row['runs']})"]
        cells += [f"{row[key] / row['parameters']:.2e}" for key in ("seconds", "cpu_seconds")]
        memory = ("memory_bytes", "peak_bytes", "planned_peak_bytes")
        cells += [f"{row[key] / 1e6:,.0f} MB" for key in (*memory, "written_bytes", "planned_disk_bytes")]
        rows.append(cells)
    return table(rows)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot CPU time per weight and memory of the process over the size of the model."""
    from matplotlib.ticker import EngFormatter

    from know_hf.plotting.style import BLUE, GREEN, VERMILION, legend, new_figure, save_figure, style_axes

    figure = new_figure(7, 2.8)
    time_axes, memory_axes = figure.subplots(1, 2)
    ways = dict.fromkeys(row["kernel"] for row in rows)
    for way, colour, marker in zip(ways, (BLUE, VERMILION, GREEN), "osD", strict=False):
        of_way = sorted((row for row in rows if row["kernel"] == way), key=lambda row: row["parameters"])
        sizes, style = [row["parameters"] for row in of_way], {"color": colour, "marker": marker, "label": way}
        time_axes.plot(sizes, [1e9 * row["cpu_seconds"] / row["parameters"] for row in of_way], **style)
        memory_axes.plot(sizes, [row["peak_bytes"] / 1e9 for row in of_way], **style)
    style_axes(time_axes, "Time", "parameters", "CPU nanoseconds per weight", "y")
    style_axes(memory_axes, "Memory", "parameters", "process, GB", "y")
    for axes in (time_axes, memory_axes):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_ylim(bottom=0)
    legend(figure, *time_axes.get_legend_handles_labels(), ncols=len(ways))
    save_figure(figure, path)


def stop_at_failure(contestant: Contestant) -> None:
    if contestant.failure:
        raise SystemExit(contestant.details)


def log(message: str) -> None:
    print(f"{time.perf_counter() - STARTED:4.0f} s  {message}", file=sys.stderr, flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    shown = ["resnet18", "bert", "1b"]
    add(
        "--sizes",
        nargs="*",
        choices=SIZES,
        default=shown,
        help="models to predict end to end (default: resnet18 bert 1b)",
    )
    kernels = ["eager", "folded", "cpu", "triton"]
    add("--kernels", nargs="*", default=kernels, help="kernels of know_hf.known.kernels (default: all)")
    ways = "kernels for end to end, or linear, a predictor that costs little; auto+gate and linear+gate: with a gate"
    add("--predict-with", nargs="*", default=["auto"], metavar="KERNEL", help=f"{ways} (default: auto)")
    add("--trajectories", type=Path, help="folder of the trajectories, which are kept (default: temporary)")
    add("--plot", type=Path, metavar="FILE", help="write a plot of time and memory over the size")
    add("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="forms of the published network (default: all)")
    add("--peer-weights", type=Path, help="folder with the published KNOWN_*.h5 (default: the shipped weights)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="device of KNOWN (default: cpu)")
    add("--threads", type=int, default=0, help="threads of every process (default: number of cores)")
    add("--output-dir", help="folder for temporary files (default: that of the system)")
    add("--repetitions", type=int, default=3, help=f"end to end, none after {MAX_SECONDS} s (default: %(default)s)")
    add("--rows", type=int, default=0, help="weights for the function alone (default: 2^20, on a GPU 2^24)")
    add("--seconds", type=float, default=1.0, help="seconds per repetition, function alone (default: %(default)s)")
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="write all numbers to this file; predictions whose numbers it has are not repeated",
    )
    return parser


if __name__ == "__main__":
    from know_hf.terminal import run_program

    arguments = make_parser().parse_args()
    sys.exit(run_program("prediction.py", lambda: main(arguments)))
