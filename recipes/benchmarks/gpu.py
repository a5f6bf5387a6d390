"""What a GPU changes: kernel of KNOWN, meta-training, recording and comparison. At most 8 minutes on one H100.

    python recipes/benchmarks/gpu.py --json gpu.json
    python recipes/benchmarks/gpu.py --data uoft-cs/cifar100=FOLDER uoft-cs/cifar10=FOLDER
    TRITON_INTERPRET=1 python recipes/benchmarks/gpu.py --smoke      # tiny sizes, on a CPU

All inputs but `--data` are synthetic or scikit-learn's digits. Parts that cannot run, and those that would begin after
the time limit, are listed with the reason. Prints a Markdown table and, in the last line, all numbers as JSON.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATED_ROUNDING = {0.05: 5e-7, 0.3: 2e-5}  # largest difference from float64 by the size of the weights
EXPONENTIALS_PER_CLOCK = 16  # of a multiprocessor of an NVIDIA GPU since Volta
PUBLISHED = {  # of the suite imagenet-style, at reduced length
    "seeds": 2,
    "landscape": None,
    "training": {"num_train_epochs": 3},
    "source": {"train": 10000},
    "arms": ["naive", "random", "known-step-1", "known-step-2", "matched-shrink-step-2"],
    "model": {
        "class_name": "ResNetForImageClassification",
        "config": {
            "layer_type": "basic",
            "embedding_size": 64,
            "hidden_sizes": [64, 128, 256, 512],
            "depths": [2, 2, 2, 2],
        },
    },
}


@dataclass(frozen=True)
class Setting:
    """Device and sizes of the measurements."""

    device: str
    folder: Path
    data: Mapping[str, str]
    smoke: bool

    def synchronize(self) -> None:
        import torch

        if self.device != "cpu":
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], object], least: float = 1.0) -> float:
        """Return the mean time of a call, over calls of `least` seconds after a first one."""
        function()
        self.synchronize()
        start, calls = time.perf_counter(), 0
        while not calls or time.perf_counter() - start < (0 if self.smoke else least):
            function()
            self.synchronize()
            calls += 1
        return (time.perf_counter() - start) / calls


def main(args: argparse.Namespace) -> None:
    import torch

    from know_hf.markdown import table

    if not args.smoke and not torch.cuda.is_available():
        raise ValueError("no GPU is available; --smoke runs tiny sizes on the CPU")
    device, started = "cpu" if args.smoke else "cuda", time.perf_counter()
    parts = {
        "kernel": kernel,
        "meta-training": meta_training,
        "recording": recording,
        "stacked comparison": comparison,
    }
    name = "smoke test on a CPU" if args.smoke else torch.cuda.get_device_name()
    results: dict[str, Any] = {"device": name, "torch": torch.__version__}
    with tempfile.TemporaryDirectory(dir=args.output_dir, prefix="benchmark-") as folder:
        setting = Setting(device, Path(folder), dict(pair.split("=", 1) for pair in args.data), args.smoke)
        for part, measure in {**parts, "published protocol": published}.items():
            print(f"{time.perf_counter() - started:4.0f} s  {part}", file=sys.stderr, flush=True)
            if time.perf_counter() - started > 60 * args.minutes:
                results[part] = {"not run": f"{args.minutes:g} minutes have passed"}
                continue
            try:
                results[part] = measure(setting)
            except Exception as error:  # such as one of Triton's compiler; the other parts are measured
                results[part] = {"not run": reason(error)}
    results["seconds"] = time.perf_counter() - started
    rows = [["part", "measurement", name]]
    for part, values in results.items():
        if isinstance(values, dict):
            rows += [[part, key, f"{v:.3g}" if isinstance(v, float) else str(v)] for key, v in values.items()]
    text = json.dumps(results)
    print(table(rows), text, sep="\n\n")
    if args.json:
        args.json.write_text(text + "\n")


def reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def kernel(setting: Setting) -> dict[str, Any]:
    """Compare the Triton kernel with eager PyTorch: values, time and share of the limits of the GPU."""
    import torch

    from know_hf import KNOWNModel
    from know_hf.known.kernels import residual
    from know_hf.prediction import SHIPPED_KNOWN

    model, results = KNOWNModel.from_pretrained(SHIPPED_KNOWN).to(setting.device), {}
    generator = torch.Generator(setting.device).manual_seed(0)

    def history(rows: int, scale: float) -> torch.Tensor:
        """Weights that move by a hundredth, or by a third if they are large; contiguous per state."""
        steps = 0.01 * scale if scale < 0.1 else scale / 3
        shape = (model.config.num_states, rows)
        walk = steps * torch.randn(shape, generator=generator, device=setting.device)
        walk[0] *= scale / steps
        return walk.cumsum(0).T

    def check(name: str) -> None:
        """Compare the kernel with the model in float64."""
        for scale, bound in STATED_ROUNDING.items():
            small, differences = history(192 if setting.smoke else 1 << 20, scale), []
            for role in model.networks:
                with torch.inference_mode():
                    expected = exact.networks[role](small.double(), small.double().diff(dim=1))
                differences.append(float((residual(model, small, role, name) - expected).abs().max()))
            key = f"{name}, weights of {scale}: difference from float64"
            more = f", more than the stated {bound:.0e}" if max(differences) > bound else ""
            results[key] = f"{max(differences):.1e}{more}"

    exact, seconds = copy.deepcopy(model).double(), {}
    large = history(256 if setting.smoke else 1 << 24, 0.05)
    for name in ("eager", "folded", "triton"):
        try:
            check(name)
            seconds[name] = setting.seconds(lambda name=name: residual(model, large, "fc", name)) / len(large)
        except Exception as error:
            results[f"{name}: not run"] = reason(error)
            continue
        results[f"{name}: seconds per weight"] = seconds[name]
        results[f"{name}: times eager"] = seconds["eager"] / seconds[name]
    copied = torch.empty((1 << 12) if setting.smoke else (1 << 28), device=setting.device)
    bandwidth = 2 * copied.nbytes / setting.seconds(copied.clone)
    moved, exponentials = 4 * (model.config.num_states + 1), 2 * model.config.hidden_size
    for name, per_weight in seconds.items():
        results[f"{name}: share of the memory bandwidth of a copy"] = moved / per_weight / bandwidth
        if setting.device != "cpu":
            gpu = torch.cuda.get_device_properties(0)
            rate = EXPONENTIALS_PER_CLOCK * gpu.multi_processor_count * 1e3 * gpu.clock_rate
            results[f"{name}: share of the exponentials of the GPU"] = exponentials / per_weight / rate
    return results


def meta_training(setting: Setting) -> dict[str, Any]:
    """Time steps of the meta-training with the published network and batch, with reading, on the GPU and the CPU."""
    import torch
    from meta_training import record

    from know_hf import KNOWNConfig, KNOWNModel, TransitionDataset
    from know_hf.meta_learning import BalancedBatchSampler, MetaTrainingArguments
    from know_hf.meta_learning.objective import MetaObjective

    record(setting.folder / "nets", 8 if setting.smoke else 32, 2 if setting.smoke else 40)
    paths = sorted(path.parent for path in (setting.folder / "nets").glob("*/trajectory.json"))
    data, args = TransitionDataset(paths, progress=False), MetaTrainingArguments()
    batches, results = iter(BalancedBatchSampler(data, 64 if setting.smoke else args.batch_size, 1_000_000)), {}
    for device in dict.fromkeys((setting.device, "cpu")):
        objective = MetaObjective(KNOWNModel(KNOWNConfig()).to(device), data, args)
        optimizer = torch.optim.Adam(objective.parameters(), lr=args.learning_rate)

        def step(objective: Any = objective, optimizer: Any = optimizer, device: str = device) -> None:
            batch = data.by_role(next(batches))
            moved = {role: {key: v.to(device) for key, v in part.items()} for role, part in batch.items()}
            objective(moved)["objective"].backward()
            for network in objective.model.networks.values():
                torch.nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

        threads = "" if device != "cpu" else f", {torch.get_num_threads()} threads"
        results[f"steps per second, {device}{threads}"] = 1 / setting.seconds(step, 5.0)
    return results


def recording(setting: Setting) -> dict[str, Any]:
    """Time how long a training waits for a state, beside `save_pretrained`."""
    from recording import make_model, median, time_recording, training_step
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1)) if setting.smoke else make_model("random-350m")
    model = model.to(setting.device)
    train = training_step(model, 4)

    def step() -> None:
        train()
        setting.synchronize()

    step()
    saving = median(lambda number: model.save_pretrained(setting.folder / f"saved-{number}"), 3)
    blocked, written, _ = time_recording(model, step, setting.folder, 5)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "save_pretrained, seconds": saving,
        "training waits for a state, seconds": blocked,
        "share of save_pretrained": blocked / saving,
        "state hashed and on disk after, seconds": written,
    }


def comparison(setting: Setting) -> dict[str, Any]:
    """Time the trials of an arm on digits one by one and as stacks of models."""
    import statistics

    from comparison import PATHS, make_parser, measure

    suite = reduced("digits", smoke_suite(), setting) if setting.smoke else "digits"
    arguments = [str(suite), "--arms", "naive", "--repetitions", "1", "--output-dir", str(setting.folder)]
    seconds = measure(make_parser().parse_args(arguments))[0]["naive"]
    results = {}
    for protocol, paths in seconds.items():
        old, new = (statistics.median(paths[path]) for path in PATHS)
        results |= {f"{protocol}, one by one, seconds": old, f"{protocol}, together, seconds": new}
    return results


def published(setting: Setting) -> dict[str, Any]:
    """Run the published protocol, CIFAR-100 → CIFAR-10 with ResNet-18, at reduced length; return test accuracies."""
    from know_hf.evaluation import run_suite

    if setting.smoke:
        suite = reduced("digits", smoke_suite(), setting)
    elif setting.data:
        suite = reduced("imagenet-style", PUBLISHED, setting)
    else:
        raise ValueError("it needs --data uoft-cs/cifar100=FOLDER uoft-cs/cifar10=FOLDER")
    report = run_suite(suite, setting.folder / "published", data=setting.data, pages=False)
    accuracies: dict[str, list[float]] = {}
    for cell in report.cells:
        for protocol, (draw,) in cell["measured"].items():
            test = draw["trials"][draw["chosen"]]["test"]
            accuracies.setdefault(f"{cell['arm']}, {protocol}: accuracy", []).append(test["accuracy"])
    return {name: sum(values) / len(values) for name, values in accuracies.items()}


def smoke_suite() -> dict[str, Any]:
    return {
        "seeds": 2,
        "training": {"num_train_epochs": 1},
        "schedule": {"num_states": 2, "epochs_per_stage": 1},
        "landscape": None,
        "protocols": [{"kind": "linear_probe", "learning_rates": [0.1, 0.3], "steps": 5}],
        "arms": ["naive", "random"],
    }


def reduced(name: str, changes: Mapping[str, Any], setting: Setting) -> Path:
    """Write a shipped suite with other settings; mappings are merged."""
    import yaml

    from know_hf.evaluation.suites.suite import SUITES_DIR

    content = yaml.safe_load((SUITES_DIR / f"{name}.yaml").read_text(encoding="utf-8"))
    for key, value in changes.items():
        merges = isinstance(value, dict) and isinstance(content.get(key), dict) and key != "model"
        content[key] = {**content[key], **value} if merges else value
    path = setting.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", default=[], metavar="ID=PATH", help="folders of the datasets of the published protocol")
    add("--minutes", type=float, default=8, help="no part begins after this time (default: 8)")
    add("--smoke", action="store_true", help="tiny sizes on the CPU")
    add("--output-dir", help="folder for temporary files (default: that of the system)")
    add("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    return parser


if __name__ == "__main__":
    from know_hf.terminal import run_program

    arguments = make_parser().parse_args()
    sys.exit(run_program("gpu.py", lambda: main(arguments)))
