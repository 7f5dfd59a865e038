"""The frozen models of a run: loaded, or as a cache knows them."""

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from clipkd import data, distributed, files, progress
from clipkd.config.objective import require_number_of_teachers
from clipkd.config.train import TrainConfig
from clipkd.evaluation.embed import DTYPES
from clipkd.models.encoder import PROBES, Encoder
from clipkd.models.load import load_model, weight_files
from clipkd.models.text_tower import copy_text_tower, text_sha256
from clipkd.objective.closed_set import closed_set_fingerprint
from clipkd.teachers.store.reader import StoredTeacher, TeacherCache, open_cache


@dataclass(frozen=True)
class Teacher:
    """A frozen model, loaded or as a cache knows it, and what sets it apart from any other, wherever it lies."""

    model: Encoder | StoredTeacher
    identity: dict[str, Any]


def configured_teachers(config: TrainConfig) -> tuple[str, ...]:
    """Names of the teachers to load: none with a cache."""
    return () if config.teacher.cache is not None else config.teacher.names


def load_teacher(model: str, *, dtype: str) -> Teacher:
    """A frozen model with the weights as they are stored; `hold_teachers` rounds them to the dtype."""
    with torch.random.fork_rng(devices=[]):  # later draws must not depend on whether a teacher is loaded
        encoder = load_model(model).requires_grad_(False)
    identity = {
        "sha256": encoder.weights_sha256(),  # as they are stored
        "dtype": dtype,
        "preprocess_cfg": encoder.preprocess_config,
        "model_cfg": encoder.model_config,
        "tokens": hashlib.sha256(encoder.spec.tokenize(list(PROBES)).numpy().tobytes()).hexdigest(),
    }
    return Teacher(encoder, identity)


def share_text_tower(config: TrainConfig, student: Encoder, teachers: list[Teacher]) -> None:
    """Give the student the first teacher's text tower, if it shall have it; before that is rounded.

    teachers: none with a cache; then the first is loaded for as long as this takes. Raises: ValueError if it does not fit.
    """
    if config.student.text == "teacher":
        first = teachers[0] if teachers else load_teacher(config.teacher.names[0], dtype=config.teacher.dtype)
        assert isinstance(first.model, Encoder)
        copy_text_tower(first.model, student)


def hold_teachers(teachers: list[Teacher]) -> None:
    """Each in the dtype that is configured."""
    for teacher in teachers:
        if isinstance(teacher.model, Encoder) and (dtype := teacher.identity["dtype"]) != "fp32":
            teacher.model.hold_in(DTYPES[dtype])


def open_teacher_cache(config: TrainConfig, pairs: data.Pairs, student: Encoder) -> TeacherCache:
    """Raises: FileNotFoundError or ValueError that name the file or option that does not fit."""
    student_text = text_sha256(student) if student.text_is_frozen else None
    cache = open_cache(config, pairs, student_text=student_text, track=progress.track_on_main)
    distributed.from_main(lambda: require_same_teachers(config, cache))
    require_number_of_teachers(config.objective, len(cache.teachers))
    closed_set = config.objective.closed_set
    if closed_set.weight and (
        cache.manifest.classes is None or cache.manifest.classes.fingerprint != closed_set_fingerprint(closed_set)
    ):
        raise ValueError(
            f"{cache.folder} holds no class vectors for objective.closed_set's classes and templates; make a cache with this "
            "objective"
        )
    return cache


def require_same_teachers(config: TrainConfig, cache: TeacherCache) -> None:
    """Of the teachers that the configuration names beside a cache. Raises: ValueError."""
    named, records = config.teacher.names, cache.manifest.teachers
    if named and len(named) != len(records):
        raise ValueError(
            f"{cache.folder} holds {len(records)} teachers, teacher.models names {len(named)}; leave it out, or make another "
            "cache"
        )
    for number, (model, record) in enumerate(zip(named, records, strict=False)):
        digests = {str(path): files.sha256(path) for path in weight_files(model)}
        if record.files and digests:
            other = [
                f"{path} with other weights" for path, digest in digests.items() if digest not in record.files.values()
            ]
        else:
            other = [model] if model != record.model else []
        if other:
            raise ValueError(
                f"{cache.folder} holds features of {record.model}, but teacher.models[{number}] is {other[0]}; leave it out, "
                "or make another cache"
            )
        if config.teacher.dtype != record.identity["dtype"]:
            raise ValueError(
                f"{cache.folder} was made with teacher.dtype {record.identity['dtype']}, now it is {config.teacher.dtype}; "
                "change it back"
            )


def name_teachers(config: TrainConfig, cache: TeacherCache | None) -> TrainConfig:
    """The configuration with the names of the cache's teachers, for the run folder, its report and its card."""
    if cache is None:
        return config
    records = cache.manifest.teachers
    models, dtype = tuple(record.model for record in records), records[0].identity["dtype"]
    return dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, models=models, dtype=dtype))


def stored_teachers(cache: TeacherCache) -> list[Teacher]:
    return [Teacher(teacher, teacher.identity) for teacher in cache.teachers]


def loaded(teachers: list[Teacher]) -> list[Encoder]:
    """None of them where features come from a cache."""
    return [teacher.model for teacher in teachers if isinstance(teacher.model, Encoder)]
