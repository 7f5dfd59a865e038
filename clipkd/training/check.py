"""`clipkd check`: describe what a configuration will run and cost, and list all its problems, before a first step."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import nn

from clipkd import data, distributed
from clipkd.config.parse import parse
from clipkd.config.train import TrainConfig
from clipkd.errors import RunStopped, collecting, one_line
from clipkd.models import students
from clipkd.models.cost import count_saved
from clipkd.models.encoder import Encoder
from clipkd.progress import mib
from clipkd.training.assemble import Parts, list_notes, open_parts
from clipkd.training.resume import find_checkpoint
from clipkd.training.run import Run, build_run
from clipkd.views import Batch, ViewSpec

T = TypeVar("T")
TIMED_STEPS = 3
CHANCE_TIMES = 3
"""A teacher that finds its pairs less than this many times as often as chance does not know these data."""


@dataclass
class Findings:
    """Problems, which forbid the run, and notes, which the user should read. Only the main process prints."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note_skips(self, skips: Iterable[data.Skip]) -> None:
        self.notes += [f"{skip.cause}: {skip.key[-200:]!r} {skip.message[:200]}" for skip in skips]

    def attempt(self, make: Callable[[], T]) -> T | None:
        """The result of `make`; None if it fails, which adds a problem."""
        try:
            return make()
        except torch.OutOfMemoryError as error:
            advice = "raise micro_batches, lower objective.tile_size or batch_size, or set teacher.dtype to bf16"
            self.add(f"the device's memory is too small: {advice} ({one_line(error)})")
        except (ValueError, OSError, FloatingPointError, RunStopped, RuntimeError) as error:
            self.add(one_line(error))
        except SystemExit:  # raised by a task file's parser, which has printed the reason
            self.add("evaluation.task cannot be used; the reason is above")
        return None

    def add(self, problem: str) -> None:
        self.problems.append(problem[:2000])


def check(arguments: list[str]) -> list[str]:
    """Arguments of `clipkd train` → this process's problems; prints a description of the run, which is not written."""
    findings = Findings()
    with collecting() as wrong_options:
        config = parse(arguments, "check")
    findings.problems += dict.fromkeys(wrong_options)
    if config.threads is not None and config.threads > 0:
        torch.set_num_threads(config.threads)
    parts = open_parts(config, findings.attempt)
    if not wrong_options:
        describe_parts(config, parts, findings)
    if "accelerator" in parts:
        findings.notes += list_notes(config, parts["accelerator"].device)
    findings.attempt(lambda: find_checkpoint(config))
    everywhere = distributed.gather_objects(findings.problems)
    findings.problems = list(dict.fromkeys(problem for problems in everywhere for problem in problems))
    if not findings.problems:
        try_run(config, Parts(**parts), findings)
    elif distributed.rank() > 0:
        findings.problems = []  # the main process prints them
    for note in dict.fromkeys(findings.notes):
        tell("note", note)
    return findings.problems


def try_run(config: TrainConfig, parts: Parts, findings: Findings) -> None:
    run = findings.attempt(lambda: build_run(config, parts, dry=True))
    if run is None:
        return
    describe_memory(run)
    tell("", f"loss: {run.learner.distiller.describe_logits(config.batch_size)}")
    if run.done >= config.steps:
        tell("step", f"nothing left to do: {run.done:,} of {config.steps:,} steps are done")
        return
    with run.feed:
        findings.attempt(lambda: try_steps(run, findings))


def tell(topic: str, text: str) -> None:
    if distributed.rank() == 0:
        print(f"{topic:<10}{text}", flush=True)


def describe_parts(config: TrainConfig, parts: dict[str, Any], findings: Findings) -> None:
    """Describe every part that could be opened, and note weights that are not finite."""
    pairs, student, teachers = (parts.get(name) for name in ("pairs", "student", "teachers"))
    if pairs is not None:
        describe_data(config, pairs, findings)
    if student is not None:
        describe_model("student", student, findings)
    if teachers is not None and teachers.stored is not None:
        tell("teacher", teachers.describe())
    for number, teacher in enumerate(() if teachers is None else teachers.encoders):
        describe_model(f"teacher {number}" if number else "teacher", teacher, findings)
        if student is not None:
            tell("", compare_views(student.spec, teacher.spec))


def describe_data(config: TrainConfig, pairs: data.Pairs, findings: Findings) -> None:
    world_size, seen = distributed.world_size(), config.steps * config.batch_size
    parts = f" in {config.micro_batches} micro-batches" if config.micro_batches > 1 else ""
    batch = f"{config.batch_size:,} pairs = {world_size} × {config.batch_size / world_size:g}{parts}"
    batch += f"; {config.steps:,} steps see {seen:,}"
    tell("data", pairs.describe())
    if isinstance(pairs, data.PairSet):
        for source, options in zip(pairs.sources, pairs.configs, strict=True):
            times = f", {options.weight:g} × per epoch" if options.weight != 1 else ""
            tell("", f"{' '.join(options.paths)}: {int(source.shard_sizes.sum()):,} pairs{times}")
        damaged = [skip for source in pairs.sources for skip in source.damaged]
        findings.note_skips([*damaged, *pairs.left_out.examples][:5])
        size = pairs.mixture(config.seed).epoch_size
        batch += f" = {seen / size:.3g} epochs of {size:,} pairs, {size / config.batch_size:,.1f} steps each"
    elif len(pairs.shards) < (readers := world_size * max(1, config.data.num_workers)):
        findings.notes.append(f"{readers} readers share {len(pairs.shards)} streamed shards: some read ahead")
    tell("batch", batch)


def describe_model(role: str, encoder: Encoder, findings: Findings) -> None:
    sizes = students.count_parameters(encoder.model)
    parts = [f"{encoder.name}: {sizes['image'] / 1e6:.2f}M image + {sizes['text'] / 1e6:.2f}M text parameters"]
    parts += [f"width {encoder.dim}", encoder.describe_inputs(), encoder.spec.tokenizer_name]
    if encoder.dtype != torch.float32:
        parts.append(str(encoder.dtype).removeprefix("torch."))
    parts += [
        f"{tower} tower {'frozen' if mode == 'frozen' else 'frozen but for its projection'}"
        for tower, mode in encoder.frozen.items()
    ]
    tell(role, ", ".join(parts))
    for note in encoder.notes:
        tell("", note)
    tensors = encoder.model.state_dict().items()
    broken = [name for name, tensor in tensors if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        findings.add(f"{encoder.name}: weights that are not finite: {', '.join(broken[:3])}")


def compare_views(student: ViewSpec, teacher: ViewSpec) -> str:
    """The inputs that the teacher does not share with the student; each costs time in the loader."""
    names = ("size", "interpolation", "mean", "std", "tokenizer_name")
    pairs = [(name, getattr(teacher, name), getattr(student, name)) for name in names]
    own = [f"{name} {theirs} (student {ours})" for name, theirs, ours in pairs if theirs != ours]
    return f"sees its own {', '.join(own)}" if own else "sees the student's pixels and tokens"


def describe_memory(run: Run) -> None:
    """Bytes per process that the architecture fixes; those of activations are measured by a step."""
    distiller, ema, teachers = run.learner.distiller, run.learner.ema, run.learner.teachers.encoders
    gradients = num_bytes(distiller, trained=True)
    sizes = {"weights": num_bytes(distiller), "gradients": gradients, "AdamW": 2 * gradients}
    sizes |= {} if ema is None else {"average": num_bytes(ema.model)}
    sizes |= {"teachers": sum(map(num_bytes, teachers))} if teachers else {}
    tell("memory", ", ".join(f"{name} {mib(size)}" for name, size in sizes.items()))


def num_bytes(model: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not trained)


def try_steps(run: Run, findings: Findings) -> None:
    """Measure a first step, then time some more. Nothing of them is kept."""
    batches, left = run.batches(), run.config.steps - run.done
    batch = next(batches)
    if not run.config.images_alone:
        describe_retrieval(run, batch, findings)
    run.watch.take_window()
    with count_saved() as saved:
        metrics = {name: value.item() for name, value in run.step(batch).items()}  # waits for the device
        run.learner.finish_step()
    terms = ", ".join(f"{name} {metrics[name]:.4g}" for name in run.learner.distiller.active)
    tell("loss", f"{metrics['loss']:.4g} ({terms})")
    peak = f", peak {mib(torch.cuda.max_memory_allocated())}" if run.learner.accelerator.device.type == "cuda" else ""
    tell("", f"kept between the passes of a step, forward and backward, {mib(saved.peak)}{peak}")
    if left > 1:
        run.watch.take_window()  # the first step warms up
    for _ in range(min(TIMED_STEPS, left - 1)):
        run.step(next(batches))
        run.learner.finish_step()
    findings.note_skips(run.ledger.share(run.done).examples)
    if damage := run.ledger.describe_damage(run.config.data.max_skipped):
        findings.add(f"{damage}, more than data.max_skipped allows; repair the data, or raise data.max_skipped")
    rate = run.watch.take_window()["images_per_second"]
    seconds = run.config.batch_size / rate
    time_left = timedelta(seconds=round(seconds * left))
    tell("step", f"{seconds:.3g} s, {rate:.4g} images/s; {left:,} steps in {time_left} (h:min:s)")


@torch.no_grad()
def describe_retrieval(run: Run, batch: Batch, findings: Findings) -> None:
    """The number of images for which each teacher finds the caption: the quickest sign of wrong preprocessing."""
    batch = batch.to(run.learner.accelerator.device)
    view, *teacher_views = run.learner.views.of(batch)
    for number, features in enumerate(run.learner.targets(batch, view, teacher_views).teachers):
        best = torch.cat([(some @ features.text.T).argmax(dim=1) for some in features.image.split(1024)]).cpu()
        found, size = int((best == torch.arange(len(best))).sum()), len(best)
        role = f"teacher.models[{number}]"
        tell("", f"{role} finds the right caption for {found} of {size} images of a batch (by chance for 1)")
        if size >= 16 and found < CHANCE_TIMES:
            findings.notes.append(
                f"{role} hardly finds any caption: are its weights, tokenizer and preprocessing its own, and are these "
                "data of a kind that it knows?"
            )
