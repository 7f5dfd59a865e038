"""The parts of a run, each opened from the configuration by itself, so that `check` can continue where one fails."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from clipkd import data, distributed, progress
from clipkd.config.train import TrainConfig
from clipkd.data.order import BatchOrder
from clipkd.evaluation.subjects import Subject, open_subjects
from clipkd.evaluation.tasks import METRICS, as_tuple
from clipkd.models.encoder import Encoder
from clipkd.models.initial import initial_student
from clipkd.objective.closed_set import closed_set_fingerprint, open_closed_set
from clipkd.objective.distiller import Distiller
from clipkd.teachers.cached import Teachers, open_teachers
from clipkd.training import optim
from clipkd.training.evaluator import parse_best


@dataclass(frozen=True)
class Parts:
    """What a run is made of, still on the CPU."""

    accelerator: Accelerator
    student: Encoder
    pairs: data.Pairs
    teachers: Teachers
    subjects: list[Subject]


def assemble(config: TrainConfig) -> Parts:
    """Raises: ValueError or FileNotFoundError for the first thing that is wrong."""
    return Parts(**open_parts(config, lambda make: make()))


def open_parts(config: TrainConfig, attempt: Callable[[Callable[[], Any]], Any]) -> dict[str, Any]:
    """The fields of Parts. attempt: calls its argument; where it returns None instead of raising, the field is missing."""
    attempt(lambda: require_installed(config))
    parts: dict[str, Any] = {
        "accelerator": attempt(lambda: make_accelerator(config)),
        "student": (student := attempt(lambda: initial_student(config).prefer_channels_last())),
    }
    cached = config.teacher.cache is not None
    late = cached or all(source.format == "csv" for source in (config.data, *config.data.mix))
    if not late:  # before the data, whose indexing may take long
        parts["teachers"] = attempt(lambda: open_teachers(config, student, None))
    parts["pairs"] = pairs = attempt(lambda: data.open_pairs(config.data))
    if isinstance(pairs, data.PairSet):  # too few pairs for a batch
        attempt(
            lambda: BatchOrder(pairs.mixture(config.seed), config.batch_size, range(0), 0, distributed.world_size())
        )
    if late and not (cached and (student is None or pairs is None)):
        parts["teachers"] = attempt(lambda: open_teachers(config, student, pairs))
    parts["subjects"] = attempt(lambda: open_tasks(config))
    return {name: part for name, part in parts.items() if part is not None}


def list_notes(config: TrainConfig, device: torch.device) -> list[str]:
    """What is allowed and yet hardly meant."""
    notes, (load, busy), threads = [], progress.read_load(), torch.get_num_threads()
    if busy and threads > 1 and device.type == "cpu":
        notes.append(
            f"other work is running (load {load}), which slows {threads} threads down many times; try --threads 1"
        )
    objective = config.objective
    if objective.keys != "teacher" and all(term.asks.keys for term in objective.active().values()):
        notes.append(f"objective.keys is {objective.keys}, but no term that is on has a choice of keys")
    return notes


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Raises: ValueError if Accelerate's own settings or the number of processes contradict the configuration."""
    accelerator = distributed.make_accelerator(config.precision, trackers=config.log.trackers, folder=config.output)
    if config.batch_size >= config.micro_batches > (share := config.batch_size // distributed.world_size()):
        raise ValueError(
            f"micro_batches is {config.micro_batches}, but a process's share of a batch has {share} pairs; lower it"
        )
    return accelerator


def require_installed(config: TrainConfig) -> None:
    """Raises: ValueError if a tracker's package or, for objective.compile, a compiler is missing."""
    for tracker in config.log.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ValueError(f"log.trackers names {tracker}, which is not installed: pip install 'clipkd[{tracker}]'")
    device = torch.device(distributed.join_processes().device or "cpu")
    # Triton compiles its launchers on a GPU, in C.
    language, variable, names = (
        ("C++", "CXX", ["g++", "clang++", "c++"]) if device.type == "cpu" else ("C", "CC", ["gcc", "clang"])
    )
    if config.objective.compile and not any(map(shutil.which, filter(None, [os.environ.get(variable), *names]))):
        raise ValueError(
            f"objective.compile needs a {language} compiler ({names[0]} or {names[1]}); install one, or leave it out"
        )


def open_tasks(config: TrainConfig) -> list[Subject]:
    """The tasks of evaluation during training, with their data. Raises: ValueError if evaluation.best fits none of them."""
    options = config.evaluation
    subjects = open_subjects(as_tuple(options.task), as_tuple(options.data)) if options.data else []
    if options.best is not None:
        known = {subject.name: ["main_metric", *METRICS[subject.data.kind]] for subject in subjects}
        task, metric = parse_best(options.best)
        if task not in known:
            raise ValueError(f"evaluation.best is {options.best!r}; tasks here: {list(known)}")
        if metric not in known[task]:
            raise ValueError(f"evaluation.best is {options.best!r}; metrics of {task}: {known[task]}")
    return subjects


def identify(config: TrainConfig, parts: Parts) -> dict[str, Any]:
    """Everything beyond the configuration that a resumed run must share."""
    student, closed_set = parts.student, config.objective.closed_set
    return {
        "student": {
            "name": student.name,
            "model_cfg": student.model_config,
            "preprocess_cfg": student.preprocess_config,
        },
        **parts.teachers.identity(),
        "pairs": {str(number): source for number, source in enumerate(parts.pairs.identity())},
        "mixed_precision": parts.accelerator.mixed_precision,
        "augmentation": data.AUGMENTATION_VERSION,
        "classes": closed_set_fingerprint(closed_set) if closed_set.weight else None,
    }


def make_distiller(config: TrainConfig, parts: Parts) -> Distiller:
    """Move student and teachers to the device, and build the objective on them."""
    term, closed_set, device = config.objective.closed_set, None, parts.accelerator.device
    parts.teachers.to(device)
    if term.weight:
        classes = parts.teachers.class_vectors(term)
        closed_set = open_closed_set(term, student=parts.student, teacher_classes=classes, device=device)
    return Distiller(
        parts.student,
        config.objective,
        teacher_dim=parts.teachers.models[0].dim if parts.teachers.models else None,
        queue_capacity=config.objective.queue * config.batch_size,
        closed_set=closed_set,
        device=device,
        images_alone=config.images_alone,
    ).to(device)


def make_optimizer(distiller: Distiller, config: TrainConfig) -> torch.optim.Optimizer:
    options = config.optim
    groups = optim.parameter_groups(
        distiller.named_parameters(),
        weight_decay=options.weight_decay,
        logit_scale_lr=options.logit_scale_lr,
        loaded=distiller.student.loaded,
        fresh_lr=options.fresh_lr,
        layer_decay=options.layer_decay,
    )
    # Epsilon as CLIP trains with it.
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, eps=1e-6, fused=True)
