"""The frozen teachers of a run, loaded or with the features that `clipkd cache` has stored, for which no model is loaded."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkd import distributed, files
from clipkd.config.objective import require_number_of_teachers
from clipkd.config.terms import ClosedSetTerm
from clipkd.config.train import TrainConfig
from clipkd.data import Pairs, PairSet
from clipkd.errors import require
from clipkd.models.encoder import Encoder
from clipkd.models.load import weight_files
from clipkd.objective.closed_set import closed_set_fingerprint
from clipkd.objective.distiller import require_fitting_teachers
from clipkd.teachers.loaded import LoadedTeachers, copy_towers, load_teacher, load_teachers
from clipkd.teachers.store.compare import require_same
from clipkd.teachers.store.manifest import TeacherRecord, augmentation_of, read_manifest, sources_of
from clipkd.teachers.store.reader import TeacherCache, find_faults
from clipkd.views import Batch, Features, View


class CachedTeachers:
    """Teachers whose features come with every batch. It has the methods of `LoadedTeachers`."""

    encoders: Sequence[Encoder] = ()

    def __init__(self, stored: TeacherCache) -> None:
        self.stored, self.models = stored, stored.manifest.teachers
        self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> None:
        self.device = device
        self.scales = [torch.tensor(one.logit_scale, device=device) for one in self.models]
        biases = [one.logit_bias for one in self.models]
        self.biases = [None if bias is None else torch.tensor(bias, device=device) for bias in biases]

    def features(self, batch: Batch, views: Sequence[View]) -> tuple[Features, ...]:
        return tuple(
            Features(self.read(batch, f"image.{number}"), self.read(batch, f"text.{number}"), scale, bias)
            for number, (scale, bias) in enumerate(zip(self.scales, self.biases, strict=True))
        )

    def student_view(self, batch: Batch, view: View) -> View:
        known = {tower: self.read(batch, kind) for tower, kind in self.stored.student.items() if kind}
        return view._replace(**{f"frozen_{tower}": rows for tower, rows in known.items()})

    def read(self, batch: Batch, kind: str) -> Tensor:
        """One kind of a batch's stored vectors as float32. Half precision is normalised again: rounding moves the norm."""
        features = self.stored.as_float(batch.features[self.stored.kinds.index(kind)])
        exact = self.stored.manifest.dtype == "float32" or kind in self.stored.heads
        return features if exact else F.normalize(features, dim=-1)

    def class_vectors(self, closed_set: ClosedSetTerm) -> Tensor:
        return self.stored.classes().to(self.device)

    def identity(self) -> dict[str, Any]:
        teachers = {str(number): record.identity for number, record in enumerate(self.models)}
        return {"teachers": teachers, "teacher_cache": self.stored.identity()}

    def fill_in(self, config: TrainConfig) -> TrainConfig:
        models = tuple(record.model for record in self.models)
        dtype = self.models[0].identity["dtype"] if models else config.teacher.dtype
        return dataclasses.replace(config, teacher=dataclasses.replace(config.teacher, models=models, dtype=dtype))

    def describe(self) -> str:
        return f"{self.stored.describe()}, from {self.stored.folder}"


Teachers = LoadedTeachers | CachedTeachers
"""Both have the same attributes and methods, which `LoadedTeachers` describes."""


def open_teachers(config: TrainConfig, student: Encoder | None, pairs: Pairs | None) -> Teachers:
    """Load the teachers or open their cache; copy the first teacher's towers into a student that starts with them.

    student, pairs: needed to open a cache; without a student loaded teachers are only checked. Call on every process.

    Raises: ValueError or FileNotFoundError naming the option or file that does not fit.
    """
    if config.teacher.cache is None:
        teachers: Teachers = load_teachers(config, student)
    else:
        assert student is not None
        assert pairs is not None
        teachers = open_cache(config, student, pairs)
    require_fitting_teachers(config.objective, teachers.models)
    return teachers


def open_cache(config: TrainConfig, student: Encoder, pairs: Pairs) -> CachedTeachers:
    """Open teacher.cache; check that it is undamaged and was made for this configuration. Call on every process.

    Raises: FileNotFoundError or ValueError naming the file or option that does not fit.
    """
    folder = Path(config.teacher.cache or "")
    manifest = distributed.together(lambda: read_manifest(folder))
    if "teacher" in config.student.weights().values():  # the only parts of a teacher that are loaded
        copy_towers(config.student, load_teacher((*config.teacher.names, manifest.teachers[0].model)[0]), student)
    if not isinstance(pairs, PairSet):
        raise ValueError("teacher.cache works with local data; data.path names shards behind URLs or pipes: copy them")
    plan = manifest.plan()
    seed = {"seed": plan["augmentation"]["seed"]}  # the student sees the crops of the cache
    augmentation = augmentation_of(config) | seed
    now = {"augmentation": augmentation, "data": sources_of(pairs)}
    require_same(folder, {name: plan[name] for name in now}, now)
    if faults := find_faults(folder, manifest):
        raise ValueError(
            f"{next(iter(faults.values()))}; {len(faults)} of {len(manifest.files())} files of the cache are damaged: run "
            "the same clipkd cache command again to rebuild them"
        )
    distributed.from_main(lambda: require_same_teachers(config, folder, manifest.teachers))
    require_number_of_teachers(config.objective, len(manifest.teachers))
    closed_set = config.objective.closed_set
    if closed_set.weight and manifest.classes_fingerprint != closed_set_fingerprint(closed_set):
        raise ValueError(
            f"{folder} holds no class vectors for objective.closed_set's classes and templates; make a cache with this "
            "objective"
        )
    stored = TeacherCache(folder, manifest, student=student)
    require(
        bool(manifest.teachers) or any(stored.student.values()),
        f"{folder} holds {manifest.models}, which this student does not read; leave teacher.cache out, or make a cache with "
        "the student's options",
    )
    return CachedTeachers(stored)


def require_same_teachers(config: TrainConfig, folder: Path, records: Sequence[TeacherRecord]) -> None:
    """Compare the teachers that the configuration names, if any, with the teachers of the cache. Raises: ValueError."""
    named, advice = config.teacher.names, "leave it out, or make another cache"
    if named and len(named) != len(records):
        raise ValueError(f"{folder} holds {len(records)} teachers, teacher.models names {len(named)}; {advice}")
    for number, (model, record) in enumerate(zip(named, records, strict=False)):
        digests = {str(path): files.sha256(path) for path in weight_files(model)}
        other = [path for path, digest in digests.items() if digest not in record.files.values()]
        if not (record.files and digests):  # one of them comes from a hub
            other = [model] if model != record.model else []
        if other:
            raise ValueError(
                f"{folder} holds features of {record.model}, but teacher.models[{number}] has other weights, {other[0]}; "
                f"{advice}"
            )
        if config.teacher.dtype != record.identity["dtype"]:
            raise ValueError(
                f"{folder} was made with teacher.dtype {record.identity['dtype']}, now it is {config.teacher.dtype}; "
                "change it back"
            )
