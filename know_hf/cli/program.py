"""[`main`]: runs a command, and prints its result as text or JSON."""

import argparse
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from os import devnull

from ..terminal import run_program, without_bars
from .parser import flags, make_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and print its result.

    `--json` prints one JSON document to standard output; everything else goes to standard error. `--quiet` prints
    errors only, and the JSON. Progress bars need a terminal.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments after the program name; defaults to those of the process. `--output_dir` is `--output-dir`.

    Returns:
        `int`: 0; 1 after an error, which is printed to standard error with its notes; 130 after Ctrl-C.
    """
    args = make_parser().parse_args([_dashed(arg) for arg in (sys.argv[1:] if argv is None else argv)])
    reword = partial(name_flags, flags=flags(args.parser))
    if code := run_program(f"know-hf {args.command}", lambda: _run(args), reword):
        return code
    _destroy_process_group()
    return 0


def name_flags(message: str, flags: Mapping[str, str]) -> str:
    """Replace the arguments of Python functions in a message by flags, for example `overwrite=True` by `--overwrite`.

    The message names arguments as `name=value`, `name=` or, if they have an underscore, `name`.
    """

    def flag(match: re.Match[str]) -> str:
        name, equals, value = match.groups()
        if name not in flags or not (equals or "_" in name):
            return match[0]
        return flags[name] + (f" {value}" if value and value != "True" else "")

    return re.sub(r"(?<![\w.'\"/-])([a-z_]+)\b(?![/'\"]|\.\w)(?:(=)(True\b|[\w'\"\[{-]|\.\S)?)?", flag, message)


def _run(args: argparse.Namespace) -> None:
    with _streams(args):
        try:
            result = args.run(args)
        except (OSError, ValueError) as error:
            if args.offline and _is_offline(error):
                error.add_note(f"Without a connection, {args.offline}.")
            raise
    if result is None or (args.quiet and not args.json):
        return
    as_json = partial(json.dumps, indent=2, allow_nan=False, ensure_ascii=False)
    sys.stdout.write(f"{as_json(result.to_dict()) if args.json else result}\n")


@contextmanager
def _streams(args: argparse.Namespace) -> Iterator[None]:
    """Hide deprecations in libraries; keep their output from stdout (`--json`) or both streams (`--quiet`)."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", FutureWarning)  # of libraries about each other
        if args.quiet:
            stack.enter_context(redirect_stdout(stack.enter_context(open(devnull, "w"))))
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            stack.callback(logging.disable, logging.NOTSET)
        elif args.json:
            stack.enter_context(redirect_stdout(sys.stderr))
        if args.quiet or not sys.stderr.isatty():
            stack.enter_context(without_bars())
        yield


def _is_offline(error: BaseException | None) -> bool:
    """Whether the Hub could not be reached, by the error and those that led to it."""
    hub = sys.modules.get("huggingface_hub.errors")
    kinds = (ConnectionError, *([] if hub is None else [hub.LocalEntryNotFoundError]))
    return error is not None and (isinstance(error, kinds) or _is_offline(error.__cause__ or error.__context__))


def _dashed(arg: str) -> str:
    flag, equals, value = arg.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else arg


def _destroy_process_group() -> None:
    """End the process group of a launched command, because the interpreter may abort at exit if it is open."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
