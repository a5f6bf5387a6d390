"""What recording a state costs the training, against `save_pretrained` of the same model in the same run.

    python recipes/benchmarks/recording.py --model sentence-transformers/all-MiniLM-L6-v2
    python recipes/benchmarks/recording.py --model random-350m

Prints, as medians over the repetitions: the seconds in which the training stands still for a state, as a share of
`save_pretrained`'s; the memory that the copy takes, as a share of the weights; and how much slower training steps are
while a state is being written than without.
"""

import argparse


def main(args: argparse.Namespace) -> None:
    import gc
    import json
    import resource
    import statistics
    import tempfile
    import time
    from pathlib import Path

    import torch
    from transformers import AutoModel, GPT2Config, GPT2LMHeadModel

    from know_hf import WeightTrajectory

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.model == "random-350m":
        model: torch.nn.Module = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    else:
        model = AutoModel.from_pretrained(args.model)
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    ids = torch.randint(0, 1000, (args.batch_size, 64))

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def step() -> None:
        """One forward and backward pass, and a small move of every weight, as an optimizer makes it."""
        model(input_ids=ids)[0].float().square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-1e-6)
                    parameter.grad = None

    def steps_per_second(seconds: float) -> float:
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            step()
            count += 1
        return count / (time.perf_counter() - start)

    step()
    saving, blocked, writing, alone, beside = [], [], [], [], []
    with tempfile.TemporaryDirectory(dir=args.output_dir) as folder:
        for repetition in range(args.repetitions):
            start = time.perf_counter()
            model.save_pretrained(Path(folder, f"saved-{repetition}"))
            saving.append(time.perf_counter() - start)
        gc.collect()
        before = peak()
        trajectory = WeightTrajectory.create(Path(folder, "trajectory"))
        for repetition in range(args.repetitions):
            step()
            start = time.perf_counter()
            trajectory.record(model, num_examples=args.repetitions - repetition, steps=1, background=True)
            blocked.append(time.perf_counter() - start)
            trajectory.check(wait=True)
            writing.append(time.perf_counter() - start)
        extra = peak() - before
        # one state a stage: what a stage of args.stage_seconds loses to the state that is written at its beginning
        for repetition in range(args.repetitions):
            alone.append(steps_per_second(args.stage_seconds))
            stage = WeightTrajectory.create(Path(folder, f"stage-{repetition}"))
            stage.record(model, num_examples=1, steps=1, background=True)
            beside.append(steps_per_second(args.stage_seconds))
            stage.check(wait=True)
    results = {
        "model": args.model,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "threads": torch.get_num_threads(),
        "save_pretrained_seconds": statistics.median(saving),
        "blocked_seconds": statistics.median(blocked),
        "written_after_seconds": statistics.median(writing),
        "blocked_share_of_save_pretrained": statistics.median(blocked) / statistics.median(saving),
        "extra_memory_share_of_weights": extra / nbytes,
        "stage_seconds": args.stage_seconds,
        "steps_slower_by": 1 - statistics.median(beside) / statistics.median(alone),
    }
    print(json.dumps(results, indent=2))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="random-350m", help="Hub id, folder, or random-350m (default: %(default)s)")
    add("--output-dir", default=None, help="disk to write to, by default that of temporary files; emptied again")
    add("--repetitions", type=int, default=5, help="states, and stages (default: %(default)s)")
    add("--stage-seconds", type=float, default=30, help="length of a stage of training (default: %(default)s)")
    add("--batch-size", type=int, default=4)
    add("--threads", type=int, default=0, help="of torch; 0 leaves its default")
    return parser


if __name__ == "__main__":
    main(make_parser().parse_args())
