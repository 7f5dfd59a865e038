"""The command line: `clipkd COMMAND`, `python -m clipkd COMMAND` or `accelerate launch -m clipkd COMMAND`."""

import errno
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from clipkd import __version__
from clipkd.config.parse import parse, parse_into
from clipkd.errors import Interrupted, RunStopped, one_line

HELP = """usage: clipkd COMMAND [--help] …

Distill a large CLIP into a small one.

commands:
  check    try a configuration and report every problem: clipkd check mine.yaml --data.path shards
  cache    compute the teachers' features once, to train from them: clipkd cache mine.yaml --output DIR --views 4
           clipkd cache verify DIR [--recompute 64]
  train    train a student: clipkd train mine.yaml, or clipkd train RECIPE --data.path shards
  report   draw a run's curves, throughput, skipped samples and evaluations as one HTML page
  eval     zero-shot numbers of any model: clipkd eval --model M --task imagenet1k --data /data/imagenet
           clipkd eval ls | validate DATA | compare FIRST SECOND
  export   a student for open_clip, transformers and ONNX Runtime, verified: clipkd export RUN --to open_clip,hf,onnx --output DIR
  predict  use what was exported: clipkd predict DIR photo.jpg --labels 'a cat' 'a dog'
           clipkd predict DIR FOLDER --query 'a red car'
  bench    latency, throughput, memory and size of what was exported, in each of its formats: clipkd bench DIR
  demo     all of it on a small real data set, in minutes on a CPU

clipkd COMMAND --help lists the options of a command with units and defaults. An error is one line; with
CLIPKD_TRACEBACK=1 in the environment it comes with its traceback.
"""


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(f"clipkd {__version__}")
        return
    command = COMMANDS.get(arguments[0])
    if command is None:
        print(f"clipkd: error: no command {arguments[0]!r}; choose from {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    run_command(arguments[0], command, arguments[1:])


def run_command(name: str, command: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Errors that a user can mend become one line and exit status 2 (1 for a run that failed); others keep their traceback."""
    logging.getLogger().setLevel(logging.ERROR)  # open_clip reports what clipkd checks, as warnings of the root logger
    process = f" (process {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    try:
        with warnings.catch_warnings():
            tell_own_warnings(name)
            command(arguments)
    except (ValueError, OSError, FloatingPointError, RunStopped) as error:
        message = one_line(error)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full:
            goes_on = {"train": ", then go on with --resume latest", "cache": ", then give the same command again"}
            message += "; free space" + goes_on.get(name, "")
        print(f"clipkd {name}{process}: error: {message}", file=sys.stderr)
        if os.environ.get("CLIPKD_TRACEBACK"):
            raise
        raise SystemExit(1 if full or isinstance(error, FloatingPointError | RunStopped) else 2) from None
    except Interrupted as stop:
        end_by(stop.number, f"clipkd {name}: stopped by {stop}" if is_main_process() else "")
    except KeyboardInterrupt:
        finished = {
            "train": "finished checkpoints are",
            "cache": "finished shards are",
            "eval": "finished results are",
            "predict": "an --index is",
        }
        kept = f"; {finished[name]} kept" if name in finished else ""
        end_by(signal.SIGINT, f"clipkd {name}{process}: interrupted{kept}")


def tell_own_warnings(name: str) -> None:
    """Warnings of this package as one line of the main process; others as ever."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], path: str, *rest: Any) -> None:
        if os.path.dirname(__file__) not in path:
            usual(message, category, path, *rest)
        elif is_main_process():
            print(f"clipkd {name}: warning: {message}", file=sys.stderr)

    warnings.showwarning = show


def end_by(number: int, message: str) -> NoReturn:
    """Exit with a signal's status, and not by a second one that comes while the interpreter tidies up."""
    for impatient in (signal.SIGINT, signal.SIGTERM):
        signal.signal(impatient, signal.SIG_IGN)
    if message:
        print(message, file=sys.stderr)
    raise SystemExit(128 + number) from None


def with_config(arguments: list[str]) -> list[str]:
    """FILE.yaml … → --config FILE.yaml …"""
    return arguments if not arguments or arguments[0].startswith("-") else ["--config", *arguments]


def train_command(arguments: list[str]) -> None:
    config = parse(with_config(arguments))
    from clipkd.training.loop import train

    folder = train(config)
    if is_main_process():
        print(f"trained {config.steps} steps: {folder}")


def check_command(arguments: list[str]) -> None:
    from clipkd.training.check import check

    problems = check(with_config(arguments))
    process = "" if is_main_process() else f" (process {os.environ['RANK']})"
    for problem in problems:
        print(f"clipkd check{process}: problem: {problem}", file=sys.stderr)
    if problems:
        raise SystemExit(2)


def cache_command(arguments: list[str]) -> None:
    if arguments and (command := CACHE_COMMANDS.get(arguments[0])):
        command(arguments[1:])
        return
    if "--output" not in {argument.split("=")[0] for argument in arguments} and "--help" not in arguments:
        arguments = [*arguments, "--output", ""]  # not that of a training config, which is a run's
    from clipkd.teachers.cache import command as cache

    config = parse_into(cache.CacheConfig, with_config(arguments), "cache", "Compute the teachers' features once.")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that nothing half written stays
    folder = cache.run(config)
    if is_main_process():
        print(f"cached: {folder}; train from it with --teacher.cache {folder}")


def cache_verify_command(arguments: list[str]) -> None:
    from clipkd.teachers.cache.verify import verify

    problems = verify(arguments)
    for problem in problems:
        print(f"clipkd cache verify: problem: {problem}", file=sys.stderr)
    if problems:
        raise SystemExit(2)


def report_command(arguments: list[str]) -> None:
    from clipkd import report

    positional = {"run": "A run folder of clipkd train, finished or not."}
    config = parse_into(report.ReportConfig, arguments, "report", "Draw a run as one HTML page.", positional=positional)
    print(f"report: {report.write_report(config)}")


def eval_command(arguments: list[str]) -> None:
    if arguments and (command := EVAL_COMMANDS.get(arguments[0])):
        command(arguments[1:])
        return
    from clipkd.evaluation import command as evaluation

    config = parse_into(evaluation.EvalConfig, arguments, "eval", "Evaluate models zero-shot.")
    evaluation.run(config)
    if is_main_process():
        print(f"results: {config.output}")


def eval_list_command(arguments: list[str]) -> None:
    from rich.console import Console

    from clipkd.evaluation import listing

    config = parse_into(listing.ListConfig, arguments, "eval ls", "List the tasks.")
    Console(width=None if sys.stdout.isatty() else 1000).print(listing.list_tasks(config))


def eval_validate_command(arguments: list[str]) -> None:
    from clipkd.evaluation import validate

    about = "Check data folders: layout, labels, class names, templates, images."
    positional = {"data": "A data folder, or a folder of the data folders of several tasks."}
    config = parse_into(validate.ValidateConfig, arguments, "eval validate", about, positional=positional)
    problems = validate.validate(config)
    for problem in problems:
        print(f"clipkd eval validate: problem: {problem}", file=sys.stderr)
    if problems:
        raise SystemExit(2)


def eval_compare_command(arguments: list[str]) -> None:
    from clipkd.evaluation import compare

    positional = {
        "first": "Baseline: a results folder of clipkd eval, or one of its samples/*.parquet.",
        "second": "What is compared with it.",
    }
    config = parse_into(
        compare.CompareConfig, arguments, "eval compare", "Compare two models, paired.", positional=positional
    )
    rows, problems = compare.compare(config)
    for row in rows:
        print(compare.describe_comparison(row))
    for problem in problems:
        print(f"clipkd eval compare: {problem}", file=sys.stderr)
    if problems:
        raise SystemExit(1)


def export_command(arguments: list[str]) -> None:
    from clipkd.export import command as export
    from clipkd.export import hub

    positional = {"checkpoint": "A run folder (its newest checkpoint), one checkpoint of it, or an open_clip folder."}
    config = parse_into(
        export.ExportConfig, arguments, "export", "Write a student for other software.", positional=positional
    )
    if config.push_to_hub:
        hub.check_repository(config.push_to_hub)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that nothing unfinished stays
    rows = export.export(config)
    for row in rows:
        print(export.describe_artefact(row))
    print(f"exported: {config.output}/README.md says how to use it")
    if any(row["error"] for row in rows):
        raise SystemExit(1)
    if config.push_to_hub:
        address = hub.upload(Path(config.output), config.push_to_hub, private=config.private)
        print(f"uploaded: {address}")


def predict_command(arguments: list[str]) -> None:
    from clipkd.inference.predict import PredictConfig, predict

    positional = {
        "model": "An exported folder, or anything that clipkd eval --model takes.",
        "images": "Image files, and folders that are searched for them with all that is below. As in training, no "
        "image is turned as its EXIF orientation says.",
    }
    about = "Name what images show (--labels), or find the images that show something (--query)."
    for line in predict(parse_into(PredictConfig, arguments, "predict", about, positional=positional)):
        print(line)


def bench_command(arguments: list[str]) -> None:
    from rich.console import Console

    from clipkd.inference import bench

    positional = {"model": "An exported folder, an open_clip folder or a run."}
    about = "Measure latency, throughput, memory and size of a model in each of its formats."
    config = parse_into(bench.BenchConfig, arguments, "bench", about, positional=positional)
    path, record = bench.run(config)
    Console(width=None if sys.stdout.isatty() else 1000).print(bench.table(record))
    print(f"results: {path}")
    for runtime, reason in record["errors"].items():
        print(f"clipkd bench: problem: {runtime}: {reason}", file=sys.stderr)
    if record["errors"]:
        raise SystemExit(1)


def demo_command(arguments: list[str]) -> None:
    from clipkd import demo

    demo.run(parse_into(demo.DemoConfig, arguments, "demo", "All of it on drawings of 1,337 things."))


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


EVAL_COMMANDS = {"ls": eval_list_command, "validate": eval_validate_command, "compare": eval_compare_command}
CACHE_COMMANDS = {"verify": cache_verify_command}
COMMANDS = {
    "check": check_command,
    "cache": cache_command,
    "train": train_command,
    "report": report_command,
    "eval": eval_command,
    "export": export_command,
    "predict": predict_command,
    "bench": bench_command,
    "demo": demo_command,
}
