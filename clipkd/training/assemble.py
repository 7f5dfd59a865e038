"""The parts of a run, each built from the configuration by itself, so that `check` can go on where one fails."""

import importlib.util
import os
import shutil
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from clipkd import data, distributed
from clipkd.config.train import TrainConfig
from clipkd.evaluation.subjects import Subject, open_subjects
from clipkd.evaluation.tasks import METRICS, as_tuple
from clipkd.models.create import initial_student
from clipkd.models.encoder import Encoder
from clipkd.objective.closed_set import closed_set_fingerprint, open_closed_set
from clipkd.objective.distiller import Distiller
from clipkd.teachers.open import Teachers, open_teachers
from clipkd.training import optim


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Raises: ValueError if Accelerate's own settings or the number of processes contradict the configuration."""
    accelerator = distributed.make_accelerator(config.precision, trackers=config.log.trackers, folder=config.output)
    if config.batch_size >= config.micro_batches > (share := config.batch_size // distributed.world_size()):
        raise ValueError(
            f"micro_batches is {config.micro_batches}, but a process's share of a batch has {share} pairs; lower it"
        )
    return accelerator


def require_installed(config: TrainConfig) -> None:
    """Raises: ValueError if a tracker's package, or the compiler that objective.compile needs on a CPU, is not there."""
    for tracker in config.log.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ValueError(f"log.trackers names {tracker}, which is not installed: pip install 'clipkd[{tracker}]'")
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    device = distributed.join_processes().device
    on_cpu = device is not None and device.type == "cpu"
    if config.objective.compile and on_cpu and not any(map(shutil.which, filter(None, compilers))):
        raise ValueError(
            "objective.compile needs a C++ compiler on a CPU (g++ or clang++); install one, or leave it out"
        )


def open_tasks(config: TrainConfig) -> list[Subject]:
    """The evaluations on the way, with their data. Raises: ValueError if the best checkpoint's metric is none of theirs."""
    options = config.evaluation
    subjects = open_subjects(as_tuple(options.task), as_tuple(options.data)) if options.data else []
    if options.best is not None:
        task, metric = parse_best(options.best)
        found = [subject for subject in subjects if subject.name == task]
        if not found:
            raise ValueError(f"evaluation.best is {options.best!r}; tasks here: {[s.name for s in subjects]}")
        if metric not in (known := ("main_metric", *METRICS[found[0].data.kind])):
            raise ValueError(f"evaluation.best is {options.best!r}; metrics of {task}: {list(known)}")
    return subjects


def parse_best(best: str) -> tuple[str, str]:
    """TASK or TASK:METRIC → task, metric."""
    task, _, metric = best.partition(":")
    return task, metric or "main_metric"


def identify(
    config: TrainConfig, student: Encoder, teachers: Teachers, pairs: data.Pairs, precision: str
) -> dict[str, Any]:
    """What a resumed run must share beyond its configuration."""
    closed_set = config.objective.closed_set
    identity: dict[str, Any] = {
        "student": {
            "name": student.name,
            "model_cfg": student.model_config,
            "preprocess_cfg": student.preprocess_config,
        },
        **teachers.identity(),
        "pairs": {str(number): source for number, source in enumerate(pairs.identity())},
        "mixed_precision": precision,
        "augmentation": data.AUGMENTATION_VERSION,
    }
    if closed_set.weight:
        identity["classes"] = closed_set_fingerprint(closed_set)
    return identity


def make_distiller(config: TrainConfig, student: Encoder, teachers: Teachers, device: torch.device) -> Distiller:
    """Student, teachers and all that the objective needs, on the device."""
    teachers.to(device)
    term, closed_set = config.objective.closed_set, None
    if term.weight:
        classes = teachers.class_vectors(term)
        closed_set = open_closed_set(term, student=student, teacher_classes=classes, device=device)
    dim = teachers.models[0].dim if teachers.models else None
    return Distiller(student, config.objective, teacher_dim=dim, closed_set=closed_set, device=device).to(device)


ADAM_EPS = 1e-6  # as CLIP trains


def make_optimizer(distiller: Distiller, config: TrainConfig) -> torch.optim.Optimizer:
    options = config.optim
    groups = optim.parameter_groups(
        distiller.named_parameters(), weight_decay=options.weight_decay, logit_scale_lr=options.logit_scale_lr
    )
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, eps=ADAM_EPS, fused=True)


@dataclass(frozen=True)
class Parts:
    """What a run is made of, on the CPU still."""

    accelerator: Accelerator
    student: Encoder
    teachers: Teachers
    pairs: data.Pairs
    subjects: list[Subject]


def assemble(config: TrainConfig) -> Parts:
    """Raises: ValueError or FileNotFoundError for the first thing that is wrong."""
    require_installed(config)
    accelerator = make_accelerator(config)
    student = initial_student(config)
    pairs = data.open_pairs(config.data)
    teachers = open_teachers(config, student, pairs)
    return Parts(accelerator, student, teachers, pairs, open_tasks(config))
