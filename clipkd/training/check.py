"""`clipkd check`: what a configuration will run, what it will take, and everything that is wrong with it, before a first step."""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

from clipkd import data, distributed
from clipkd.config.parse import parse
from clipkd.config.train import TrainConfig
from clipkd.errors import RunStopped, collecting
from clipkd.models import students
from clipkd.models.cost import count_saved
from clipkd.models.create import initial_student
from clipkd.models.encoder import Encoder
from clipkd.objective.loss_memory import measure_loss_memory
from clipkd.progress import mib
from clipkd.teachers.open import Teachers, open_teachers
from clipkd.training import assemble
from clipkd.training import loop as train
from clipkd.training.assemble import Parts
from clipkd.training.resume import find_checkpoint
from clipkd.training.run import Run, build_run, record_skips, skipped_too_much
from clipkd.views import Batch, ViewSpec

T = TypeVar("T")
TIMED_STEPS = 3
SLOW_STEP = 60.0  # seconds of a first step after which no more are timed

CHANCE_TIMES = 3
"""A teacher that finds its pairs less than this many times as often as chance does not know these data."""


@dataclass
class Findings:
    """Problems and notes. Only the main process prints."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note_skips(self, skips: Iterable[data.Skip]) -> None:
        self.notes += [f"{skip.cause}: {skip.key[-200:]!r} {skip.message[:200]}" for skip in skips]

    def attempt(self, make: Callable[[], T]) -> T | None:
        """What `make` returns, or None and a problem more."""
        try:
            return make()
        except torch.OutOfMemoryError as error:
            advice = "raise micro_batches, lower objective.tile_size or batch_size, or set teacher.dtype to bf16"
            self.add(f"the device's memory is too small: {advice} ({error})")
        except (ValueError, OSError, FloatingPointError, RunStopped, RuntimeError) as error:
            self.add(str(error))
        except SystemExit:  # a task file's parser has said what is wrong
            self.add("evaluation.task cannot be used, as said above")
        return None

    def add(self, problem: str) -> None:
        if "Original Traceback" in problem:  # raised in a loader process; its last line is what happened
            problem = problem.strip().splitlines()[-1].split(": ", 1)[-1]
        self.problems.append(" ".join(problem.split())[:2000])

    def share(self) -> None:
        """What any process found, all have found. Call on every process."""
        found = distributed.gather_objects(self.problems)
        self.problems = list(dict.fromkeys(problem for problems in found for problem in problems))


def check(arguments: list[str]) -> list[str]:
    """Arguments of `clipkd train` → this process's problems; prints what would run.

    Writes nothing but indexes of shards, and in a teacher cache which of its files were found right.
    """
    findings = Findings()
    with collecting() as wrong_options:
        config = parse(arguments, "check")
    findings.problems += dict.fromkeys(wrong_options)
    if config.threads is not None and config.threads > 0:
        torch.set_num_threads(config.threads)
    parts = find_parts(config, findings)
    findings.attempt(lambda: find_checkpoint(config))
    findings.share()
    if parts is not None and not findings.problems:
        try_run(config, parts, findings)
    elif distributed.rank() > 0:
        findings.problems = []  # the main process tells them
    for note in dict.fromkeys(findings.notes):
        tell("note", note)
    return findings.problems


def try_run(config: TrainConfig, parts: Parts, findings: Findings) -> None:
    run = findings.attempt(lambda: build_run(config, parts))
    if run is None:
        return
    run.dry = True
    memory = measure_loss_memory(
        run.distiller, [teacher.dim for teacher in run.teachers.models], batch_size=config.batch_size
    )
    tell("", f"logits of the loss: {memory.describe()}")
    if run.start >= config.steps:
        tell("step", f"nothing left to do: {run.start:,} of {config.steps:,} steps are done")
        return
    with run.feed:
        findings.attempt(lambda: try_steps(run, findings))


def tell(topic: str, text: str) -> None:
    if distributed.rank() == 0:
        print(f"{topic:<10}{text}", flush=True)


def find_parts(config: TrainConfig, findings: Findings) -> Parts | None:
    """Open every part by itself, describe it if the options make sense, and return them if all could be opened."""
    sound = not findings.problems
    findings.attempt(lambda: assemble.require_installed(config))
    accelerator = findings.attempt(lambda: assemble.make_accelerator(config))
    student = findings.attempt(lambda: initial_student(config))
    pairs = findings.attempt(lambda: data.open_pairs(config.data))
    teachers = None
    if config.teacher.cache is None or (student is not None and pairs is not None):
        teachers = findings.attempt(lambda: open_teachers(config, student, pairs))
    if sound and pairs is not None:
        describe_data(config, pairs, findings)
    if sound:
        describe_batch(config, pairs)
    if student is not None:
        describe_model("student", student)
        findings.problems += find_broken_weights(student)
    if teachers is not None and teachers.stored is not None:
        tell("teacher", teachers.describe())
    for number, teacher in enumerate(teachers.encoders if teachers is not None else ()):
        describe_model(f"teacher {number}" if number else "teacher", teacher)
        if student is not None:
            tell("", compare_views(student.spec, teacher.spec))
        findings.problems += find_broken_weights(teacher)
    subjects = findings.attempt(lambda: assemble.open_tasks(config))
    if accelerator is None or student is None or pairs is None or subjects is None or teachers is None:
        return None
    if sound:
        describe_memory(config, student, teachers)
    return Parts(accelerator, student, teachers, pairs, subjects)


def describe_data(config: TrainConfig, pairs: data.Pairs, findings: Findings) -> None:
    readers = distributed.world_size() * max(1, config.data.num_workers)
    if not isinstance(pairs, data.PairSet):
        tell("data", f"{pairs.describe()} for {readers} readers")
        if len(pairs.shards) < readers:
            findings.notes.append(
                f"{len(pairs.shards)} streamed shards are fewer than {readers} readers: some read ahead"
            )
        return
    tell("data", pairs.describe())
    for source, options in zip(pairs.sources, pairs.configs, strict=True):
        count, where = int(source.shard_sizes.sum()), " ".join(options.paths)
        times = f", {options.weight:g} × per epoch" if options.weight != 1 else ""
        shards = f" in {len(source.shard_sizes)} shards" if options.format == "webdataset" else ""
        tell("", f"{where}: {count:,} pairs{shards}{times}")
    findings.note_skips([*(skip for source in pairs.sources for skip in source.damaged), *pairs.left_out.examples][:5])


def describe_batch(config: TrainConfig, pairs: data.Pairs | None) -> None:
    world_size, seen = distributed.world_size(), config.steps * config.batch_size
    text = f"{config.batch_size:,} pairs = {world_size} × {config.batch_size / world_size:g}"
    text += f" in {config.micro_batches} micro-batches" if config.micro_batches > 1 else ""
    text += f"; {config.steps:,} steps see {seen:,}"
    if isinstance(pairs, data.PairSet):
        size = pairs.mixture(config.seed).epoch_size
        text += f" = {seen / size:.3g} epochs of {size:,} pairs, {size / config.batch_size:,.1f} steps each"
    tell("batch", text)


def describe_model(role: str, encoder: Encoder) -> None:
    sizes = students.count_parameters(encoder.model)
    spec, configured = encoder.spec, encoder.model_config
    parts = [f"{encoder.name}: {sizes['image'] / 1e6:.2f}M image + {sizes['text'] / 1e6:.2f}M text parameters"]
    parts += [f"width {encoder.dim}", f"{spec.size[0]} × {spec.size[1]} px {spec.interpolation}", spec.tokenizer_name]
    if configured is not None:
        parts.append("QuickGELU" if configured.get("quick_gelu") else "GELU")
    if encoder.dtype != torch.float32:
        parts.append(str(encoder.dtype).removeprefix("torch."))
    if encoder.text_is_frozen:
        parts.append("text tower frozen")
    tell(role, ", ".join(parts))


def compare_views(student: ViewSpec, teacher: ViewSpec) -> str:
    """What the teacher sees otherwise than the student, each of which costs time in the loader."""
    own = [
        f"{name} {theirs} (student {ours})"
        for name, ours, theirs in (
            ("resolution", student.size, teacher.size),
            ("interpolation", student.interpolation, teacher.interpolation),
            ("mean", student.mean, teacher.mean),
            ("std", student.std, teacher.std),
            ("tokens", student.tokenizer_name, teacher.tokenizer_name),
        )
        if ours != theirs
    ]
    return f"sees its own {', '.join(own)}" if own else "sees the student's pixels and tokens"


def find_broken_weights(encoder: Encoder) -> list[str]:
    broken = [name for name, tensor in encoder.model.state_dict().items() if not finite(tensor)]
    return [f"{encoder.name}: weights that are not finite: {', '.join(broken[:3])}"] if broken else []


def finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def describe_memory(config: TrainConfig, student: Encoder, teachers: Teachers) -> None:
    """Bytes per process that do not depend on the architecture's inner workings; activations are measured by a step."""
    weights = sum(parameter.numel() for parameter in student.parameters())
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    own = {"weights": 4 * weights, "gradients": 4 * trained, "AdamW": 8 * trained}
    own |= {"average": 4 * weights} if config.optim.ema_momentum else {}
    own |= {"DDP": 4 * trained} if distributed.world_size() > 1 else {}
    frozen = sum(p.numel() * p.element_size() for encoder in teachers.encoders for p in encoder.parameters())
    capacity = config.objective.queue.capacity
    widths = [student.dim if ring == "momentum" else teachers.models[0].dim for ring in config.objective.queues]
    parts = [f"student {mib(sum(own.values()))} ({', '.join(f'{k} {mib(v)}' for k, v in own.items())})"]
    parts += [f"teachers {mib(frozen)}"] if frozen else []
    parts += [f"queue {mib(8 * capacity * sum(widths))}"] if capacity else []
    tell("memory", ", ".join(parts))


def try_steps(run: Run, findings: Findings) -> None:
    """A first step, measured, then some more for their time. Nothing of it is kept."""
    batch = next(run.feed)
    describe_retrieval(run, batch, findings)
    seconds: list[float] = []
    with count_saved() as saved:
        seconds.append(timed_step(run, batch, run.start))
    peak = f", peak {mib(torch.cuda.max_memory_allocated())}" if run.accelerator.device.type == "cuda" else ""
    tell("", f"kept between the passes of a step, forward and backward, {mib(saved.peak)}{peak}")
    (slow,) = distributed.maximum([int(seconds[0] > SLOW_STEP)], run.accelerator.device)
    while len(seconds) <= TIMED_STEPS and not slow and run.start + len(seconds) < run.config.steps:
        started = time.perf_counter()
        batch = next(run.feed)
        waited = time.perf_counter() - started
        seconds.append(waited + timed_step(run, batch, run.start + len(seconds)))
    steps = run.start + len(seconds)
    findings.note_skips(record_skips(run, steps).examples)
    if damage := skipped_too_much(run, steps):
        findings.add(f"{damage}, more than data.max_skipped allows; mend the data, or raise data.max_skipped")
    typical = statistics.median(seconds[1:] or seconds)
    left = timedelta(seconds=round(typical * (run.config.steps - run.start)))
    rate = run.config.batch_size / typical
    tell("step", f"{typical:.3g} s, {rate:.4g} images/s; {run.config.steps - run.start:,} steps in {left} (h:min:s)")


def timed_step(run: Run, batch: Batch, step: int) -> float:
    started = time.perf_counter()
    metrics = train.training_step(run, batch, step)
    loss = metrics["loss"].item()  # waits for the device
    took = time.perf_counter() - started
    if step == run.start:
        terms = ", ".join(f"{name} {metrics[name].item():.4g}" for name in run.distiller.active)
        tell("loss", f"{loss:.4g} ({terms})")
    return took


@torch.no_grad()
def describe_retrieval(run: Run, batch: Batch, findings: Findings) -> None:
    """How many images of a batch each teacher gives its own caption: the quickest sign of a wrong preprocessing."""
    student_view, *teacher_views = run.views.of(batch, run.accelerator.device)
    for number, features in enumerate(train.find_targets(run, batch, student_view, teacher_views).teachers):
        best = torch.cat([(some @ features.text.T).argmax(dim=1) for some in features.image.split(1024)]).cpu()
        found, size = int((best == torch.arange(len(best))).sum()), len(best)
        role = f"teacher.models[{number}]"
        tell(role, f"finds the caption of {found} of {size} images among the batch's (by chance 1)")
        if size >= 16 and found < CHANCE_TIMES:
            findings.notes.append(
                f"{role} hardly finds any caption: are its weights, tokenizer and preprocessing its own, and are these "
                "data of a kind that it knows?"
            )
