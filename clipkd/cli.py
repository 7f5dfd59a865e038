"""The command line: `clipkd COMMAND`, `python -m clipkd COMMAND` or `accelerate launch -m clipkd COMMAND`."""

import errno
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from clipkd import __version__
from clipkd.config.parse import parse, parse_into
from clipkd.config.paths import require_paths
from clipkd.errors import END_SIGNALS, Interrupted, RunStopped, one_line, raise_at_signals
from clipkd.process import keep_freed_memory, read_launcher

HELP = """usage: clipkd COMMAND [--help] …

Distill a large CLIP into a small one.

commands:
  check    try a configuration and report every problem: clipkd check mine.yaml --data.path shards
  cache    compute the teachers' features once: clipkd cache mine.yaml --output DIR --views 4 | cache verify DIR
  inherit  cut a student out of a teacher: clipkd inherit TEACHER --depth 6 --width 384 --output student.json
  train    train a student: clipkd train mine.yaml, or clipkd train RECIPE --data.path shards
  sweep    train every row of a grid with several seeds, and compare: clipkd sweep grid.yaml --seeds 3 --jobs 2
  report   draw a run's curves, throughput, skipped samples and evaluations as one HTML page
  eval     zero-shot numbers of any model: clipkd eval --model M --task T --data DIR; eval ls | validate | compare
  export   a student for open_clip, transformers and ONNX Runtime, verified: clipkd export RUN --to open_clip,hf,onnx --output DIR
  predict  use what was exported: clipkd predict DIR photo.jpg --labels 'a cat' 'a dog', or DIR FOLDER --query 'a red car'
  bench    latency, throughput, memory and size of what was exported, in each of its formats: clipkd bench DIR
  demo     run every step on drawings of 1,337 things, in minutes on a CPU

clipkd COMMAND --help lists the options of a command with units and defaults. An error is one line; with
CLIPKD_TRACEBACK=1 in the environment it comes with its traceback.
"""


KEPT = {"train": "checkpoints", "cache": "shards", "eval": "results"}
"""What an interrupted command leaves for the next one."""


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without UTF-8 must not end a command
        sys.stdout.reconfigure(errors="replace")
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(f"clipkd {__version__}")
        return
    length = 2 if " ".join(arguments[:2]) in COMMANDS else 1  # such as eval compare
    name = " ".join(arguments[:length])
    if name not in COMMANDS:
        known = ", ".join(command for command in COMMANDS if " " not in command)
        print(f"clipkd: error: no command {name!r}; choose from {known}", file=sys.stderr)
        raise SystemExit(2)
    keep_freed_memory()
    run_command(name, arguments[length:])


def run_command(name: str, arguments: list[str]) -> None:
    """Print errors that a user can mend as one line and exit with status 2 (1 if a run failed); raise any other."""
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns on the root logger of what clipkd checks
    process = ""
    try:
        if name in ("check", "cache", "train", "demo") and not hasattr(os, "pread"):
            raise ValueError(f"clipkd {name} needs Linux or macOS; on Windows use WSL")
        if read_launcher() > 1:
            process = f" (process {os.environ['RANK']})"
        with warnings.catch_warnings():
            print_own_warnings(name)
            COMMANDS[name](arguments)
    except (ValueError, OSError, FloatingPointError, RunStopped) as error:
        message = one_line(error)
        disk_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if disk_full:
            resume = " with --resume latest" if name == "train" else ""
            message += f"; free space, then give the same command again{resume}"
        print(f"clipkd {name}{process}: error: {message}", file=sys.stderr)
        if os.environ.get("CLIPKD_TRACEBACK"):
            raise
        raise SystemExit(1 if disk_full or isinstance(error, FloatingPointError | RunStopped) else 2) from None
    except Interrupted as stop:
        exit_by_signal(stop.number, f"clipkd {name}: stopped by {stop}" if is_main_process() else "")
    except KeyboardInterrupt:
        kept = f"; finished {KEPT[name]} are kept" if name in KEPT else ""
        exit_by_signal(signal.SIGINT, f"clipkd {name}{process}: interrupted{kept}")


def print_own_warnings(name: str) -> None:
    """Print warnings of this package as one line, on the main process only; others as usual."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], path: str, *rest: Any) -> None:
        if os.path.dirname(__file__) not in path:
            usual(message, category, path, *rest)
        elif is_main_process():
            print(f"clipkd {name}: warning: {message}", file=sys.stderr)

    warnings.showwarning = show


def exit_by_signal(number: int, message: str) -> NoReturn:
    """Exit with the status of a signal; ignore further signals while the interpreter cleans up."""
    for each in END_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    from clipkd.progress import drop_closed_output

    drop_closed_output()
    if message:
        print(message, file=sys.stderr)
    raise SystemExit(128 + number) from None


def exit_on_problems(name: str, problems: Sequence[str], *, status: int = 2) -> None:
    for problem in problems:
        print(f"clipkd {name}: problem: {problem}", file=sys.stderr)
    if problems:
        raise SystemExit(status)


def print_table(table: Any) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 1000).print(table)


def with_config(arguments: list[str]) -> list[str]:
    """FILE.yaml … → --config FILE.yaml …"""
    return arguments if not arguments or arguments[0].startswith("-") else ["--config", *arguments]


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def train_command(arguments: list[str]) -> None:
    config = parse(with_config(arguments))
    require_paths(config)
    from clipkd.training.loop import train

    folder = train(config)
    if is_main_process():
        print(f"trained {config.steps} steps: {folder}")


def check_command(arguments: list[str]) -> None:
    from clipkd.training.check import check

    process = "" if is_main_process() else f" (process {os.environ['RANK']})"
    exit_on_problems(f"check{process}", check(with_config(arguments)))


def cache_command(arguments: list[str]) -> None:
    from clipkd.teachers.cache.command import CacheConfig, run

    if "--output" not in {argument.split("=")[0] for argument in arguments} and "--help" not in arguments:
        arguments = [*arguments, "--output", ""]  # a training config's output is the folder of a run
    config = parse_into(CacheConfig, with_config(arguments), "cache", "Compute the teachers' features once.")
    require_paths(config)
    raise_at_signals()
    folder = run(config)
    if is_main_process():
        print(f"cached: {folder}; train from it with --teacher.cache {folder}")


def cache_verify_command(arguments: list[str]) -> None:
    from clipkd.teachers.cache.verify import VerifyConfig, verify

    about = "Check that the files of a cache hold what was written."
    config = parse_into(VerifyConfig, arguments, "cache verify", about, positional=("folder",))
    exit_on_problems("cache verify", verify(config))


def inherit_command(arguments: list[str]) -> None:
    from clipkd.models.inherit import InheritConfig, inherit

    about = "Cut a student out of a teacher: some of its blocks, heads and channels."
    print("\n".join(inherit(parse_into(InheritConfig, arguments, "inherit", about, positional=("teacher",)))))


def report_command(arguments: list[str]) -> None:
    from clipkd.report import ReportConfig, write_report

    config = parse_into(ReportConfig, arguments, "report", "Draw a run as one HTML page.", positional=("run",))
    print(f"report: {write_report(config)}")


def eval_command(arguments: list[str]) -> None:
    from clipkd.evaluation.command import EvalConfig, run

    config = parse_into(EvalConfig, arguments, "eval", "Evaluate models zero-shot.")
    run(config)
    if is_main_process():
        print(f"results: {config.output}")


def eval_list_command(arguments: list[str]) -> None:
    from clipkd.evaluation.listing import ListConfig, list_tasks

    print_table(list_tasks(parse_into(ListConfig, arguments, "eval ls", "List the tasks.")))


def eval_validate_command(arguments: list[str]) -> None:
    from clipkd.evaluation.validate import ValidateConfig, validate

    about = "Check data folders: layout, labels, class names, templates, images."
    config = parse_into(ValidateConfig, arguments, "eval validate", about, positional=("data",))
    exit_on_problems("eval validate", validate(config))


def eval_compare_command(arguments: list[str]) -> None:
    from clipkd.evaluation.compare import CompareConfig, compare, describe_comparison

    about = "Compare two models, paired."
    config = parse_into(CompareConfig, arguments, "eval compare", about, positional=("first", "second"))
    rows, problems = compare(config)
    for row in rows:
        print(describe_comparison(row))
    exit_on_problems("eval compare", problems, status=1)


def export_command(arguments: list[str]) -> None:
    from clipkd.export.command import ExportConfig, describe_artefact, export

    about = "Write a student for other software."
    config = parse_into(ExportConfig, arguments, "export", about, positional=("checkpoint",))
    raise_at_signals()
    rows = export(config)
    for row in rows:
        print(describe_artefact(row))
    print(f"exported: {config.output}/README.md says how to use it")
    if any(row["error"] for row in rows):
        raise SystemExit(1)


def predict_command(arguments: list[str]) -> None:
    from clipkd.inference.predict import PredictConfig, predict

    about = "Name what images show (--labels), or find the images that show something (--query)."
    print("\n".join(predict(parse_into(PredictConfig, arguments, "predict", about, positional=("model", "images")))))


def bench_command(arguments: list[str]) -> None:
    from clipkd.inference.bench import BenchConfig, run, table

    about = "Measure latency, throughput, memory and size of a model in each of its formats."
    path, record = run(parse_into(BenchConfig, arguments, "bench", about, positional=("model",)))
    print_table(table(record))
    print(f"results: {path}")
    exit_on_problems("bench", [": ".join(error) for error in record["errors"].items()], status=1)


def demo_command(arguments: list[str]) -> None:
    from clipkd.demo import DemoConfig, run

    run(parse_into(DemoConfig, arguments, "demo", "Distill a small CLIP on drawings of 1,337 things."))


def sweep_command(arguments: list[str]) -> None:
    from clipkd.sweep import SweepConfig, sweep

    about = "Train every row of a grid with several seeds, and compare what the runs score."
    config = parse_into(SweepConfig, arguments, "sweep", about, positional=("grid",))
    raise_at_signals()
    exit_on_problems("sweep", sweep(config), status=1)


COMMANDS = {
    "check": check_command,
    "cache": cache_command,
    "cache verify": cache_verify_command,
    "inherit": inherit_command,
    "train": train_command,
    "sweep": sweep_command,
    "report": report_command,
    "eval": eval_command,
    "eval ls": eval_list_command,
    "eval validate": eval_validate_command,
    "eval compare": eval_compare_command,
    "export": export_command,
    "predict": predict_command,
    "bench": bench_command,
    "demo": demo_command,
}
