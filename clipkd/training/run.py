"""One training run: opened and checked as a whole, then logged, evaluated and saved."""

import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from clipkd import data, distributed, files, progress
from clipkd.config import train as configuration
from clipkd.config.train import TrainConfig
from clipkd.evaluation.embed import Embedder
from clipkd.evaluation.measure import measure
from clipkd.evaluation.results import describe_result, result_row
from clipkd.evaluation.subjects import Subject
from clipkd.files import claim
from clipkd.models import run_folder
from clipkd.models.encoder import Encoder
from clipkd.objective import memory as momentum
from clipkd.objective.distiller import Distiller
from clipkd.objective.loss_memory import LossMemory, measure_loss_memory
from clipkd.progress import Stopwatch
from clipkd.teachers.open import Teachers
from clipkd.training import checkpoint
from clipkd.training.assemble import Parts, assemble, identify, make_distiller, make_optimizer, parse_best
from clipkd.training.resume import find_checkpoint, require_same_run
from clipkd.views import Batch, Views

RECORDS = ("metrics.jsonl", "results.jsonl", "skipped.jsonl")


@dataclass
class Run:
    """All that a step touches. `model` is `distiller` as Accelerate wrapped it."""

    config: TrainConfig
    folder: Path
    accelerator: Accelerator
    distiller: Distiller
    model: nn.Module
    teachers: Teachers
    ema: Encoder | None
    optimizer: Any
    views: Views
    feed: data.Feed[Batch]
    subjects: list[Subject]
    identity: dict[str, Any]
    """What a resumed run must share beyond its configuration: student, teacher, pairs, precision."""
    start: int
    """Steps that were done before."""
    seconds: float
    """Training time of the steps before this start, evaluation and checkpoints left out."""
    num_skipped: int
    """Samples of all processes that could not be used so far."""
    streamed: tuple[int, int]
    """Streamed shards that all processes opened so far, and how many of them were damaged."""
    dry: bool = False
    """Whether steps are only tried: then nothing is written."""
    num_opened: int = 0
    skips: data.Skips = field(default_factory=data.Skips)
    claim: contextlib.AbstractContextManager[Any] = field(default_factory=contextlib.nullcontext)
    """Held while this process writes the run folder."""


def open_run(config: TrainConfig) -> Run:
    """Build and check everything; write the run folder only when nothing can fail any more.

    Raises: ValueError or FileNotFoundError that name the option to change.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    parts = assemble(config)
    run = build_run(config, parts)
    memory = measure_loss_memory(
        run.distiller, [teacher.dim for teacher in run.teachers.models], batch_size=config.batch_size
    )
    distributed.together(lambda: open_folder(run, parts.pairs, memory) if run.accelerator.is_main_process else None)
    if config.log.trackers:
        plain = configuration.flatten(configuration.to_dict(config))
        # Trackers take no lists.
        plain = {name: str(value) if isinstance(value, list) else value for name, value in plain.items()}
        run.accelerator.init_trackers("clipkd", config=plain)
    return run


def build_run(config: TrainConfig, parts: Parts) -> Run:
    """Put the parts together, at the step of the checkpoint that is resumed; writes nothing."""
    accelerator, teachers = parts.accelerator, parts.teachers
    config = teachers.fill_in(config)
    identity = identify(config, parts.student, teachers, parts.pairs, accelerator.mixed_precision)
    resumed = find_checkpoint(config)
    state = {"step": 0, "seconds": 0.0, "num_skipped": 0} if resumed is None else run_folder.read_state(resumed)
    if len(set(distributed.gather_objects(str(resumed)))) > 1:
        raise ValueError(
            f"the processes found different checkpoints in {config.output}, this one {resumed}; share the folder"
        )
    if resumed is not None:
        require_same_run(resumed, state, config, identity)
    distiller = make_distiller(config, parts.student, teachers, accelerator.device)
    ema = momentum.copy_for_average(distiller.student) if config.optim.ema_momentum else None
    optimizer = make_optimizer(distiller, config)
    if resumed is not None:
        checkpoint.restore(resumed, model=distiller, ema=ema, optimizer=optimizer)
        distiller.load_memory(checkpoint.read_memory(resumed))
    views = Views([parts.student.spec, *(encoder.spec for encoder in teachers.encoders)])
    feed = data.open_feed(
        parts.pairs,
        config,
        views,
        start=state["step"],
        places={int(reader): place for reader, place in state.get("stream", {}).items()},
        stored=teachers.stored,
        pin_memory=accelerator.device.type == "cuda",
    )
    model, prepared_optimizer = accelerator.prepare(distiller, optimizer)
    if resumed is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    return Run(
        config=config,
        folder=Path(config.output),
        accelerator=accelerator,
        distiller=distiller,
        model=model,
        teachers=teachers,
        ema=ema,
        optimizer=prepared_optimizer,
        views=views,
        feed=feed,
        subjects=parts.subjects,
        identity=identity,
        start=state["step"],
        seconds=state["seconds"],
        num_skipped=state["num_skipped"],
        streamed=tuple(state.get("streamed_shards", (0, 0))),
    )


def open_folder(run: Run, pairs: data.Pairs, memory: LossMemory) -> None:
    """config.yaml, and the records of earlier steps without those that will be done again.

    Raises: ValueError if another process writes into the folder.
    """
    start, steps = run.start, run.config.steps
    where = f"from step {start} of {steps}" if start == 0 else f"resumed from step {start} of {steps}"
    progress.console.print(f"{run.folder}: {where}, {pairs.describe()}", soft_wrap=True, markup=False)
    if teachers := run.teachers.describe():
        epochs = f"for {run.feed.epoch(steps):.3g} epochs"
        progress.console.print(f"teacher: {teachers}, {epochs}", soft_wrap=True, markup=False)
    compiles = "; the first steps compile it, which takes minutes" if run.config.objective.compile else ""
    progress.console.print(f"loss: {memory.describe()}{compiles}", soft_wrap=True, markup=False)
    run.folder.mkdir(parents=True, exist_ok=True)
    run.claim = claim(run.folder)
    configuration.save(run.config, run.folder / "config.yaml")
    for name in RECORDS:
        if start == 0:
            (run.folder / name).unlink(missing_ok=True)
        files.drop_rows_after(run.folder / name, start)
    if start == 0 and isinstance(pairs, data.PairSet) and (unusable := pairs.unusable()):
        files.append_row(run.folder / "skipped.jsonl", unusable.row(0))


def log(run: Run, step: int, metrics: dict[str, Tensor], watch: Stopwatch) -> str:
    """Mean over processes → metrics.jsonl and the trackers; returns a note for the progress bar."""
    record_skips(run, step)
    values = distributed.mean(
        torch.stack([value.detach().float().to(run.accelerator.device) for value in metrics.values()])
    )
    row = {"step": step, "epoch": run.feed.epoch(step), "world_size": distributed.world_size()}
    row |= dict(zip(metrics, values.tolist(), strict=True)) | watch.take_window() | {"skipped": run.num_skipped}
    if run.accelerator.is_main_process:
        files.append_row(run.folder / "metrics.jsonl", row)
    if run.config.log.trackers:
        run.accelerator.log(row, step=step)
    return describe(row, list(run.distiller.active))


def describe(row: dict[str, Any], terms: list[str]) -> str:
    """A logged step in a line: the loss, its terms, the divergence from the teacher, and where the time goes."""
    divergences = [name for name in row if name.endswith("_kl")]
    shown = ["loss", *(terms if len(terms) > 1 else []), *divergences]
    speed = [f"{row['images_per_second']:.3g} images/s", f"data wait {row['data_wait']:.0%}"]
    parts = [*(f"{name} {row[name]:.3g}" for name in shown), *speed]
    return ", ".join([*parts, f"{row['skipped']} skipped"] if row["skipped"] else parts)


def record_skips(run: Run, step: int) -> data.Skips:
    """What all processes skipped since the last call → skipped.jsonl. Call on every process."""
    together, opened = data.Skips(), 0
    for skips, num_opened in distributed.gather_objects((run.skips, run.num_opened)):
        together.merge(skips)
        opened += num_opened
    run.skips, run.num_opened = data.Skips(), 0
    damaged = together.counts[data.DAMAGED_SHARD]
    run.streamed = (run.streamed[0] + opened, run.streamed[1] + damaged)
    run.num_skipped += together.counts.total() - damaged
    if together and run.accelerator.is_main_process and not run.dry:
        files.append_row(run.folder / "skipped.jsonl", together.row(step))
    return together


def skipped_too_much(run: Run, step: int) -> str:
    """What the damage amounts to, if it is more than data.max_skipped allows; else nothing."""
    allowed, seen, (opened, damaged) = run.config.data.max_skipped, step * run.config.batch_size, run.streamed
    if data.exceeds(run.num_skipped, seen, allowed):
        return f"{run.num_skipped} samples could not be used among the first {seen}"
    if data.exceeds(damaged, opened, allowed, fewest=data.FEWEST_SHARDS):
        return f"{damaged} of {opened} streamed shards could not be read to their end"
    return ""


def is_evaluated(run: Run, step: int) -> bool:
    """Whether results.jsonl has this step's rows; the main process decides for all."""
    rows = [row for row in files.read_rows(run.folder / "results.jsonl") if row.get("step") == step]
    expected = len(run.subjects) * (1 if run.ema is None else 2)
    return distributed.gather_objects(len(rows) >= expected)[0]


def evaluation_is_due(run: Run, step: int) -> bool:
    """On the way; the last step's evaluation comes after the loop."""
    every = run.config.evaluation.every_steps
    return bool(run.subjects) and 0 < step < run.config.steps and every > 0 and step % every == 0


def evaluate_tasks(run: Run, step: int) -> None:
    """Every configured task on the student and, where there is one, on its moving average → results.jsonl."""
    candidates = {"student": run.distiller.student} | ({} if run.ema is None else {"ema": run.ema})
    rows: list[dict[str, Any]] = []
    for subject in run.subjects:
        for weights, encoder in candidates.items():
            training, started = encoder.training, time.perf_counter()
            distributed.copy_from_main(encoder.buffers())  # BatchNorm's: each process has seen its own share
            embedder = Embedder(
                encoder.eval(),
                run.accelerator.device,
                batch_size=run.config.evaluation.batch_size,
                num_workers=run.config.data.num_workers,
            )
            measured = measure(embedder, subject, title=f"evaluate {subject.name}")
            row = result_row(subject, embedder, measured, time.perf_counter() - started)
            encoder.train(training)
            rows.append(row | {"model": str(run.folder), "weights": weights, "step": step})
    if run.accelerator.is_main_process:
        if is_best(run, rows) and run_folder.checkpoint_folder(run.folder, step).is_dir():
            progress.console.print(f"step {step} is the best so far: {checkpoint.keep_best(run.folder, step)}")
        for row in rows:
            files.append_row(run.folder / "results.jsonl", row)
            who = f"step {step}{', moving average' if row['weights'] == 'ema' else ''}"
            progress.console.print(f"{who}: {describe_result(row)}", soft_wrap=True, markup=False)


def is_best(run: Run, rows: list[dict[str, Any]]) -> bool:
    """Whether the checkpoint in RUN/best, if there is one of these steps, was worse by the metric of evaluation.best."""
    if run.config.evaluation.best is None:
        return False
    task, metric = parse_best(run.config.evaluation.best)
    weights = "student" if run.ema is None else "ema"

    def values(found: list[dict[str, Any]]) -> list[float]:
        own = [row for row in found if (row.get("key"), row.get("weights")) == (task, weights)]
        return [value for row in own if (value := row["metrics"].get(metric)) is not None]

    best = checkpoint.best_step(run.folder)
    earlier = values([row for row in files.read_rows(run.folder / "results.jsonl") if row.get("step") == best])
    return any(value > max(earlier, default=-1.0) for value in values(rows))


def save(run: Run, step: int, seconds: float) -> None:
    """A whole checkpoint, then room for it: older ones are deleted last. Call on every process."""
    record_skips(run, step)
    places = {reader: place for part in distributed.gather_objects(run.feed.places) for reader, place in part.items()}
    if run.accelerator.is_main_process:
        scaler = run.accelerator.scaler
        state = {
            "seconds": seconds,
            "num_skipped": run.num_skipped,
            "stream": places,
            "streamed_shards": run.streamed,
            "config": configuration.to_dict(run.config),
            "identity": run.identity,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        checkpoint.save(
            run.folder,
            step,
            model=run.distiller,
            ema=run.ema,
            optimizer=run.optimizer,
            memory=run.distiller.memory(),
            state=state,
        )
        checkpoint.prune(run.folder, run.config.checkpoint.keep)
    distributed.barrier()
