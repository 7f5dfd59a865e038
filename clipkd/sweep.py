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
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from clipkd import files
from clipkd.config.parse import parse
from clipkd.errors import RunStopped, one_line, require

RUNS, TABLE = "runs.jsonl", "table.md"


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    grid: str
    """YAML with base, rows and perhaps values: see configs/README.md."""
    output: str = "runs/sweep"
    """Folder of the runs, runs.jsonl and table.md. A stopped sweep goes on where it was."""
    seeds: int = 3
    """Runs per row, with seeds 0, 1, …"""
    jobs: int = 1
    """Runs at a time."""

    def __post_init__(self) -> None:
        require(self.seeds >= 1, f"seeds is {self.seeds}; it must be 1 or more")
        require(self.jobs >= 1, f"jobs is {self.jobs}; it must be 1 or more")


def read_grid(path: Path) -> dict[str, list[str]]:
    """Name of a row → arguments of `clipkd train`. A row with {name} stands for one row per value of that name.

    Raises: ValueError naming what is wrong.
    """
    try:
        grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from error
    known = {"base": str, "rows": dict, "values": dict}
    wrong = [key for key in grid if not isinstance(grid[key], known.get(key, ()))] if isinstance(grid, dict) else ["it"]
    if wrong or not grid.get("rows"):
        raise ValueError(
            f"{path}: {', '.join(wrong) or 'rows'} is not as it should be; write base: (options of clipkd train as on the "
            "command line), rows: (name: options), and values: (name: [value, …]) for rows with {name}"
        )
    values, found = grid.get("values", {}), {}
    for row, options in grid["rows"].items():
        names = sorted(set(re.findall(r"{(\w+)}", str(row))))
        if lacking := [name for name in names if not isinstance(values.get(name), list)]:
            raise ValueError(f"{path}: row {row!r} names {{{lacking[0]}}}, but values has no list of that name")
        for chosen in itertools.product(*(values[name] for name in names)):
            given = dict(zip(names, chosen, strict=True))
            name, words = (
                re.sub(r"{(\w+)}", lambda m, g=given: str(g.get(m[1], m[0])), str(t)) for t in (row, options or "")
            )
            found[name] = [*shlex.split(grid.get("base", "")), *shlex.split(words)]
    return found


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
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "clipkd", "train", *arguments, "--seed", str(seed)]
        command += ["--output", str(folder), "--resume", "latest"]
        with (folder / "train.log").open("ab") as log:
            with self.lock:
                if self.stopped:
                    return "stopped"
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
                self.processes.add(process)
            status = process.wait()
            self.processes.discard(process)
        if status:
            last = (folder / "train.log").read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
            return f"{row}, seed {seed}: exit status {status}: {''.join(last)} (see {folder / 'train.log'})"
        with self.lock:
            files.append_row(self.output / RUNS, {"row": row, "arguments": arguments, "seed": seed, **scores(folder)})
        return None

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
    final = {row["dataset"]: row for row in rows if row["step"] == last["step"]}  # the average's row is the later one
    metrics = {name: row["metrics"] | {"n": row["n"]} for name, row in final.items()}
    return {"step": last["step"], "seconds": round(last["seconds"], 1), "loss": last["loss"], "metrics": metrics}


def sweep(config: SweepConfig) -> list[str]:
    """Train what is left of a grid, write and print the table; return what went wrong.

    Raises: ValueError if the grid or a row's options are wrong, before anything is trained.
    """
    grid, output = read_grid(Path(config.grid)), Path(config.output)
    slugs: dict[Path, str] = {}
    runs = Runs(output)
    for row, arguments in grid.items():
        parsed = parse(arguments, command=f"sweep: row {row!r}")
        require(bool(parsed.evaluation.data), f"row {row!r} has no evaluation.data; a sweep compares what runs score")
        other = slugs.setdefault(runs.folder(row, 0), row)
        require(other == row, f"rows {other!r} and {row!r} would share a folder; name them apart by letters or digits")
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
        problems = []
        with ThreadPoolExecutor(config.jobs) as pool:
            jobs = {pool.submit(runs.train, row, grid[row], seed): (row, seed) for row, seed in todo}
            try:
                for number, job in enumerate(as_completed(jobs), start=1):
                    row, seed = jobs[job]
                    problems += [problem] if (problem := job.result()) else []
                    print(f"{number} of {len(todo)}: {row}, seed {seed}{': ' + problem if problem else ''}", flush=True)
            except BaseException:
                runs.stop()
                raise
        rows = [one for one in files.read_rows(output / RUNS) if one["row"] in grid and one["seed"] < config.seeds]
        if not rows:
            raise RunStopped("; ".join(problems))
        files.write_text(output / TABLE, (table := tabulate(rows)) + "\n")
    print(table)
    return problems


def tabulate(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean ± standard deviation over seeds in %, and the mean difference from the first row at equal seeds, with
    its standard error.
    """
    by_row: dict[str, dict[int, dict[str, Any]]] = {}
    for one in rows:
        by_row.setdefault(one["row"], {})[one["seed"]] = one
    first = next(iter(by_row))
    columns = [(data, next(iter(metrics))) for data, metrics in rows[0]["metrics"].items()]
    headings = ["row", "seeds", "steps", "seconds", *(f"{data} {metric} | − {first}" for data, metric in columns)]
    width = sum(heading.count("|") + 1 for heading in headings)
    lines = [f"| {' | '.join(headings)} |", "|---|" + "---:|" * (width - 1)]
    for row, runs in by_row.items():
        cells = [row, str(len(runs)), str(max(one["step"] for one in runs.values()))]
        cells.append(f"{statistics.mean(one['seconds'] for one in runs.values()):.0f}")
        for data, metric in columns:
            values = {seed: 100 * one["metrics"][data][metric] for seed, one in runs.items()}
            pairs = [
                value - 100 * by_row[first][s]["metrics"][data][metric]
                for s, value in values.items()
                if s in by_row[first]
            ]
            cells += [
                spread(list(values.values()), 1),
                "" if row == first else spread(pairs, math.sqrt(len(pairs) or 1), "+"),
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float], divisor: float, sign: str = "") -> str:
    if not values:
        return ""
    around = f" ± {statistics.stdev(values) / divisor:.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{around}"
