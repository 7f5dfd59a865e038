"""`clipkd sweep`: train every row of a grid with several seeds, and tabulate what the runs score."""

import itertools
import math
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

from clipkd import files
from clipkd.config.parse import parse
from clipkd.config.paths import require_paths
from clipkd.errors import RunStopped, one_line, require, require_least

RUNS, TABLE, LOG = "runs.jsonl", "table.md", "train.log"
NAME = re.compile(r"{(\w+)}")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    grid: str
    """YAML with base, rows and perhaps values: see configs/README.md."""
    output: str = "runs/sweep"
    """Folder of the runs, runs.jsonl and table.md. A stopped sweep goes on where it was."""
    seeds: int = 3
    """Runs per row, with seeds 0, 1, …"""
    jobs: int = 1
    """Runs at a time; set threads, or each takes all cores."""

    def __post_init__(self) -> None:
        require_least(self, seeds=1, jobs=1)


def read_grid(path: Path) -> dict[str, list[str]]:
    """Name of a row → arguments of `clipkd train`. A row with {name} stands for one row per value of that name.

    Raises: ValueError naming what is wrong.
    """
    try:
        grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from error
    known = {"base": str, "rows": dict, "values": dict}
    given = grid if isinstance(grid, dict) else {"it": grid}
    wrong = [str(key) for key in given if not isinstance(given[key], known.get(key, ()))]
    if wrong or not given.get("rows"):
        raise ValueError(
            f"{path}: {', '.join(wrong) or 'rows'} is not as it should be; write base: (options of clipkd train as on the "
            "command line), rows: (name: options), and values: (name: [value, …]) for rows with {name}"
        )
    found = dict[str, list[str]]()
    for row, options in given["rows"].items():
        for name, words in expand(str(row), options or "", given.get("values", {}), path):
            require(name not in found, f"{path}: two rows are named {name!r}")
            found[name] = words
    try:
        base = shlex.split(given.get("base", ""))
    except ValueError as error:
        raise ValueError(f"{path}: base: {error}") from error
    for name, words in found.items():
        fixed = [word for word in (*base, *words) if re.match(r"--(seed|output|resume)\b", word)]
        require(not fixed, f"{path}: row {name!r} sets {fixed[:1]}; a sweep sets seed, output and resume itself")
    return {name: [*base, *words] for name, words in found.items()}


def expand(row: str, options: Any, values: dict[str, Any], path: Path) -> Iterator[tuple[str, list[str]]]:
    """The rows that a row with {names} stands for, each with its own words. Raises: ValueError."""
    require(isinstance(options, str), f"{path}: row {row!r}: write its options as on the command line, in one string")
    names = sorted({*NAME.findall(row), *NAME.findall(options)})
    for name in names:
        listed = isinstance(values.get(name), list) and values[name]
        require(bool(listed), f"{path}: row {row!r} names {{{name}}}, but values has no list of that name")
    for chosen in itertools.product(*(values[name] for name in names)):
        given = {name: str(value) for name, value in zip(names, chosen, strict=True)}
        title, text = (NAME.sub(lambda found: given[found[1]], part) for part in (row, options))  # noqa: B023
        try:
            yield title, shlex.split(text)
        except ValueError as error:
            raise ValueError(f"{path}: row {title!r}: {error}") from error


@dataclass
class Runs:
    """The runs of a sweep, as processes."""

    output: Path
    processes: set[subprocess.Popen[bytes]] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: bool = False

    def train(self, row: str, arguments: list[str], seed: int) -> str | None:
        """Run `clipkd train`, append its scores to runs.jsonl; return what went wrong."""
        folder = self.folder(row, seed)
        command = [sys.executable, "-m", "clipkd", "train", *arguments, "--seed", str(seed)]
        command += ["--output", str(folder), "--resume", "latest"]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / LOG).open("ab") as log:
                status = self.call(command, log)
            if status:
                last = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
                return f"{row}, seed {seed}: exit status {status}: {''.join(last)} (see {folder / LOG})"
            with self.lock:
                files.append_row(
                    self.output / RUNS, {"row": row, "arguments": arguments, "seed": seed, **scores(folder)}
                )
        except (OSError, LookupError) as error:
            return f"{row}, seed {seed}: {one_line(error)} (see {folder / LOG})"
        return None

    def call(self, command: list[str], log: IO[bytes]) -> int:
        """Exit status of a process that `stop` can end."""
        with self.lock:
            if self.stopped:
                return 1
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
            self.processes.add(process)
        status = process.wait()
        with self.lock:
            self.processes.discard(process)
        return status

    def folder(self, row: str, seed: int) -> Path:
        return self.output / "runs" / (re.sub(r"\W+", "_", row).strip("_") or "row") / str(seed)

    def stop(self) -> None:
        """Let every run save and end."""
        with self.lock:
            self.stopped = True
            for process in self.processes:
                process.send_signal(signal.SIGTERM)


def scores(folder: Path) -> dict[str, Any]:
    """Steps, seconds and the last evaluation of a finished run; of its moving average where it has one."""
    last, rows = files.read_rows(folder / "metrics.jsonl")[-1], files.read_rows(folder / "results.jsonl")
    final = {row["key"]: row for row in rows if row["step"] == last["step"]}  # the average's row is the later one
    metrics = {key: row["metrics"] | {"n": row["n"], "main": row["main_metric_name"]} for key, row in final.items()}
    return {"step": last["step"], "seconds": round(last["seconds"], 1), "loss": last["loss"], "metrics": metrics}


def sweep(config: SweepConfig) -> list[str]:
    """Train what is left of a grid, write and print the table; return what went wrong.

    Raises: ValueError if the grid or a row's options are wrong, before anything is trained.
    """
    grid, output = read_grid(Path(config.grid)), Path(config.output)
    runs = Runs(output)
    check_rows(grid, runs)
    output.mkdir(parents=True, exist_ok=True)
    with files.claim(output):
        done = {(one["row"], one["seed"]): one["arguments"] for one in files.read_rows(output / RUNS)}
        changed = [row for (row, _), arguments in done.items() if row in grid and arguments != grid[row]]
        require(
            not changed,
            f"{output} holds row {changed[:1]} with other options; choose another --output, or rename the row",
        )
        todo = [(row, seed) for seed in range(config.seeds) for row in grid if (row, seed) not in done]
        print(
            f"{len(grid)} rows × {config.seeds} seeds: {len(todo)} runs to train, {config.jobs} at a time", flush=True
        )
        problems = list[str]()
        with ThreadPoolExecutor(config.jobs) as pool:
            try:
                jobs = {pool.submit(runs.train, row, grid[row], seed): (row, seed) for row, seed in todo}
                for number, job in enumerate(as_completed(jobs), start=1):
                    row, seed = jobs[job]
                    problems += [problem] if (problem := job.result()) else []
                    print(f"{number} of {len(todo)}: {row}, seed {seed}{': ' + problem if problem else ''}", flush=True)
            except BaseException:
                runs.stop()
                raise
        trained = {(one["row"], one["seed"]): one for one in files.read_rows(output / RUNS)}
        rows = [trained[each] for each in itertools.product(grid, range(config.seeds)) if each in trained]
        if not rows:
            raise RunStopped("; ".join(problems))
        files.write_text(output / TABLE, (table := tabulate(rows)) + "\n")
    print(table)
    return problems


def check_rows(grid: dict[str, list[str]], runs: Runs) -> None:
    """Raises: ValueError if a row's options are wrong, or rows cannot be told apart or compared."""
    names, tasks = dict[Path, str](), dict[Any, str]()
    for row, arguments in grid.items():
        config = parse(arguments, command=f"sweep: row {row!r}")
        require_paths(config)
        require(bool(config.evaluation.data), f"row {row!r} has no evaluation.data; a sweep compares what runs score")
        other = names.setdefault(runs.folder(row, 0), row)
        require(other == row, f"rows {other!r} and {row!r} would share a folder; name them apart by letters or digits")
        tasks.setdefault((config.evaluation.data, config.evaluation.task), row)
        require(len(tasks) == 1, f"rows {[*tasks.values()]} are evaluated on different data; a sweep needs the same")


def tabulate(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean ± standard deviation over seeds in %, and the mean difference from the first row at equal seeds, with
    its standard error. rows: in the order of the grid.
    """
    by_row: dict[str, dict[int, dict[str, Any]]] = {}
    for one in rows:
        by_row.setdefault(one["row"], {})[one["seed"]] = one
    first = next(iter(by_row))
    columns = [(data, metrics["main"]) for data, metrics in rows[0]["metrics"].items()]
    headings = ["row", "seeds", "steps", "seconds"]
    headings += [heading for data, metric in columns for heading in (f"{data} {metric}", f"− {first}")]
    lines = [line(headings), "|---|" + "---:|" * (len(headings) - 1)]
    for row, runs in by_row.items():
        cells = [row, str(len(runs)), str(max(one["step"] for one in runs.values()))]
        cells.append(f"{statistics.mean(one['seconds'] for one in runs.values()):.0f}")
        for data, metric in columns:
            values = {
                seed: 100 * value for seed, one in runs.items() if (value := one["metrics"][data][metric]) is not None
            }
            before = {seed: one["metrics"][data][metric] for seed, one in by_row[first].items()}
            pairs = [value - 100 * before[seed] for seed, value in values.items() if before.get(seed) is not None]
            cells += [
                spread(list(values.values()), 1),
                "" if row == first else spread(pairs, math.sqrt(len(pairs) or 1), "+"),
            ]
        lines.append(line(cells))
    return "\n".join(lines)


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '∣') for cell in cells)} |"


def spread(values: list[float], divisor: float, sign: str = "") -> str:
    if not values:
        return ""
    around = f" ± {statistics.stdev(values) / divisor:.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{around}"
