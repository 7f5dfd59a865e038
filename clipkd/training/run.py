"""One training run: built from its parts, stepped, logged, evaluated and saved."""

import contextlib
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from clipkd import data, distributed, files, progress
from clipkd.config import train as configuration
from clipkd.config.train import TrainConfig
from clipkd.errors import Interrupted, Interruption, RunStopped
from clipkd.models import run_folder
from clipkd.objective.memory import MovingAverage
from clipkd.progress import Stopwatch
from clipkd.training import checkpoint
from clipkd.training.assemble import Parts, assemble, identify, list_notes, make_distiller, make_optimizer
from clipkd.training.evaluator import Evaluator
from clipkd.training.learner import Learner
from clipkd.training.ledger import Ledger
from clipkd.training.recorder import Recorder
from clipkd.training.resume import find_checkpoint, require_same_run
from clipkd.views import Batch, Views

SLOW_SAVE = 20.0
"""Seconds after which a save endangers the end of a run by a signal."""
RECORDS = ("metrics.jsonl", "results.jsonl", "skipped.jsonl")


@dataclass
class Run:
    """A run between two steps. Every method but `batches` must be called on every process."""

    config: TrainConfig
    learner: Learner
    feed: data.Feed[Batch]
    ledger: Ledger
    recorder: Recorder
    evaluator: Evaluator
    identity: dict[str, Any]
    """What a resumed run must share beyond its configuration: student, teachers, pairs, precision."""
    done: int
    """Completed steps."""
    watch: Stopwatch
    """Training time; evaluation and checkpoints do not count."""
    signals: distributed.Agreement = field(default_factory=distributed.Agreement)
    lock: contextlib.AbstractContextManager[Any] = field(default_factory=contextlib.nullcontext)
    """Held while this process writes the run folder."""

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    def batches(self) -> Iterator[Batch]:
        """This process's share of the batches of the remaining steps."""
        while self.done < self.config.steps:
            with self.watch.waiting():
                batch = next(self.feed)
            yield batch

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Take one optimizer step; see `Learner.step`."""
        self.ledger.add(batch)
        metrics = self.learner.step(batch, self.done)
        self.done += 1
        self.watch.count(self.config.batch_size)
        return metrics

    def record(self, metrics: dict[str, Tensor]) -> None:
        """Log the step if it is the first, the last or one of every log.every_steps."""
        if self.done in (1, self.config.steps) or self.done % self.config.log.every_steps == 0:
            self.learner.finish_step()  # a step that failed is no row
            self.ledger.share(self.done)
            others = self.watch.take_window() | {"skipped": self.ledger.num_skipped}
            self.recorder.write(self.done, metrics, epoch=self.feed.epoch(self.done), others=others)
        self.recorder.bar.advance()

    def agree(self, signals: Interruption) -> BaseException | None:
        """The reason to end the run after this step, the same on every process: a signal to one, or too much damage."""
        number = self.signals.on(signals.asked())
        saved = f"saved {run_folder.checkpoint_folder(self.folder, self.done)}"
        if number and self.done < self.config.steps:
            name = "the end of the terminal or launcher" if number == signal.SIGHUP else signal.Signals(number).name
            return Interrupted(number, f"{name} after step {self.done}; {saved}, continue with --resume latest")
        allowed = self.config.data.max_skipped
        if damage := self.ledger.describe_damage(allowed):
            return RunStopped(
                f"{damage}, more than data.max_skipped allows ({allowed:.1%}); {self.folder / 'skipped.jsonl'} names "
                f"some. Repair the data, or raise data.max_skipped and continue with --resume latest ({saved})"
            )
        return None

    def due(self, what: Literal["save", "evaluate"]) -> bool:
        """Whether to do that after this step. A step is saved before it is evaluated."""
        evaluation = self.evaluator.is_due(self.done)
        if what == "evaluate":
            return evaluation and not self.evaluator.is_done(self.done)
        return evaluation or self.done == self.config.steps or self.done % self.config.checkpoint.every_steps == 0

    def evaluate(self, signals: Interruption) -> None:
        """Evaluate the student. A signal ends the run at once: the step is saved, and a resumed run evaluates it."""
        with self.watch.paused(), signals.at_once():
            self.recorder.track_results(self.done, self.evaluator.evaluate(self.done))

    def save(self) -> None:
        """Write a complete checkpoint, then delete the oldest ones."""
        self.learner.finish_step()
        with self.watch.paused():
            self.ledger.share(self.done)
            # Of streamed shards: the first one that each reader has not read completely.
            places = distributed.gather_objects(self.feed.places)
            stream = {reader: place for part in places for reader, place in part.items()}
            started = time.monotonic()
            distributed.together(lambda: self.write_checkpoint(stream) if distributed.rank() == 0 else None)
            if (seconds := time.monotonic() - started) > SLOW_SAVE and distributed.rank() == 0:
                warnings.warn(
                    f"the checkpoint took {seconds:.0f} s, and launchers kill a run 30 s after SIGTERM; set "
                    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT, or give the run a faster disk",
                    stacklevel=2,
                )

    def write_checkpoint(self, stream: dict[int, int]) -> None:
        """Call on the main process. stream: of streamed shards, each reader's place."""
        scaler, ema = self.learner.accelerator.scaler, self.learner.ema
        state = {
            "seconds": self.watch.seconds,
            "stream": stream,
            "config": configuration.to_dict(self.config),
            "identity": self.identity,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        checkpoint.save(
            self.folder,
            self.done,
            model=self.learner.distiller,
            ema=ema and ema.model,
            optimizer=self.learner.optimizer,
            memory=self.learner.distiller.memory(),
            state=state | self.ledger.state(),
        )
        checkpoint.prune(self.folder, self.config.checkpoint.keep)


def open_run(config: TrainConfig) -> Run:
    """Build and check everything, then write the run folder. Raises: ValueError or FileNotFoundError naming the option."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    parts = assemble(config)
    run = build_run(config, parts)
    accelerator = run.learner.accelerator
    for note in list_notes(config, accelerator.device):
        warnings.warn(note, stacklevel=2)
    with run.watch.paused():
        distributed.together(lambda: open_folder(run, parts) if accelerator.is_main_process else None)
        if config.log.trackers:
            run.recorder.start_trackers(config)
    return run


def build_run(config: TrainConfig, parts: Parts, *, dry: bool = False) -> Run:
    """Put the parts together at the step of the resumed checkpoint; writes nothing. dry: the run's steps write nothing."""
    config, accelerator, teachers = parts.teachers.fill_in(config), parts.accelerator, parts.teachers
    identity = identify(config, parts)
    resumed = find_checkpoint(config)
    state = {"step": 0, "seconds": 0.0} if resumed is None else run_folder.read_state(resumed)
    if len(set(distributed.gather_objects(str(resumed)))) > 1:
        raise ValueError(
            f"the processes found different checkpoints in {config.output}, this one {resumed}; share the folder"
        )
    if resumed is not None:
        require_same_run(resumed, state, config, identity)
    distiller = make_distiller(config, parts)
    ema = MovingAverage(distiller.student, momentum) if (momentum := config.optim.ema_momentum) else None
    optimizer = make_optimizer(distiller, config)
    if resumed is not None:
        restored = checkpoint.restore(resumed, model=distiller, ema=ema and ema.model, optimizer=optimizer)
        distiller.load_memory(restored)
    start, folder = state["step"], Path(config.output)
    views = Views(
        [parts.student.spec, *(encoder.spec for encoder in teachers.encoders)],
        images_alone=config.images_alone,
        images_stored=teachers.stored is not None and teachers.stored.student.get("image") is not None,
    )
    feed = data.open_feed(
        parts.pairs,
        config,
        views,
        start=start,
        places={int(reader): place for reader, place in state.get("stream", {}).items()},
        stored=teachers.stored,
        pin_memory=accelerator.device.type == "cuda",
    )
    model, prepared = accelerator.prepare(distiller, optimizer)
    if resumed is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    encoders = {"student": distiller.student} | ({} if ema is None else {"ema": ema.model})
    return Run(
        config=config,
        learner=Learner(config, accelerator, distiller, model, prepared, ema, teachers, views, start=start, dry=dry),
        feed=feed,
        ledger=Ledger(None if dry else folder / "skipped.jsonl", state),
        recorder=Recorder(folder, accelerator, steps=config.steps, start=start, terms=list(distiller.active)),
        evaluator=Evaluator(config, parts.subjects, encoders, accelerator.device),
        identity=identity,
        done=start,
        watch=Stopwatch(state["seconds"]),
    )


def open_folder(run: Run, parts: Parts) -> None:
    """Lock the run folder, write config.yaml and drop the records of later steps. Raises: ValueError if it is locked."""
    start, steps, pairs = run.done, run.config.steps, parts.pairs
    compiles = "; the first steps compile it, which takes minutes" if run.config.objective.compile else ""
    lines = [
        f"{run.folder}: {'resumed ' if start else ''}from step {start} of {steps}, {pairs.describe()}",
        f"loss: {run.learner.distiller.describe_logits(run.config.batch_size)}{compiles}",
    ]
    if not start:
        lines += parts.student.notes
    if teachers := parts.teachers.describe():
        what = "teacher" if run.learner.teachers.models else "stored"
        lines.insert(1, f"{what}: {teachers}, for {run.feed.epoch(steps):.3g} epochs")
    progress.console.print("\n".join(lines), soft_wrap=True, markup=False)
    run.folder.mkdir(parents=True, exist_ok=True)
    run.lock = files.claim(run.folder)
    configuration.save(run.config, run.folder / "config.yaml")
    files.remove_leftovers(run.folder)
    for name in RECORDS:
        if start == 0:
            (run.folder / name).unlink(missing_ok=True)
        files.drop_rows_after(run.folder / name, start)
    if start == 0 and isinstance(pairs, data.PairSet) and (unusable := pairs.unusable()):
        files.append_row(run.folder / "skipped.jsonl", unusable.row(0))
