"""Teachers that are loaded and compute their features at every step."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipkd.config.terms import ClosedSetTerm
from clipkd.config.train import StudentConfig, TrainConfig
from clipkd.evaluation.embed import DTYPES
from clipkd.models.encoder import PROBES, Encoder
from clipkd.models.load import load_model
from clipkd.models.towers import copy_tower
from clipkd.objective.closed_set import class_vectors
from clipkd.views import Batch, Features, View, join


@dataclasses.dataclass
class LoadedTeachers:
    """No, one or several frozen models, in the order of teacher.models."""

    encoders: list[Encoder]
    """The loaded models, for whose `spec`s the loader prepares views; empty if the features are read from a cache."""
    identities: list[dict[str, Any]]
    """Per teacher: SHA-256 of weights and tokens, dtype, preprocessing and architecture."""
    micro_batches: int = 1
    """Parts in which a batch passes the towers."""
    stored: None = None
    """Where the loader reads features that become `Batch.features`; None if the models compute them."""

    @property
    def models(self) -> Sequence[Encoder]:
        """Name, dim and logit bias of every teacher, whether it is loaded or not."""
        return self.encoders

    def to(self, device: torch.device) -> None:
        """Move the teachers to the device on which `features` is called."""
        for encoder in self.encoders:
            encoder.to(device)

    @torch.no_grad()
    def features(self, batch: Batch, views: Sequence[View]) -> tuple[Features, ...]:
        """One unit-norm float32 `Features` per teacher. views: one per loaded model. Call within the run's autocast."""
        return tuple(
            join([encoder.features(part) for part in view.split(self.micro_batches)])
            for encoder, view in zip(self.encoders, views, strict=True)
        )

    def student_view(self, batch: Batch, view: View) -> View:
        """The student's view, with what its frozen towers give if the cache holds it."""
        return view

    def class_vectors(self, closed_set: ClosedSetTerm) -> Tensor:
        """The first teacher's class vectors of a closed set, [classes, width], on the device."""
        return class_vectors(closed_set, self.encoders[0], self.encoders[0].logit_scale.device)

    def identity(self) -> dict[str, Any]:
        """What a resumed run must find again: entries of the run's identity."""
        return {"teachers": {str(number): identity for number, identity in enumerate(self.identities)}}

    def fill_in(self, config: TrainConfig) -> TrainConfig:
        """The configuration with the teachers' names, which it may leave out if a cache knows them."""
        return config

    def describe(self) -> str:
        """One line for the terminal; empty if there are no teachers."""
        return ", ".join(encoder.name for encoder in self.encoders)


def load_teachers(config: TrainConfig, student: Encoder | None) -> LoadedTeachers:
    """Load the named teachers in teacher.dtype; copy the first one's towers into a student that starts with them.

    Raises: ValueError or FileNotFoundError naming what cannot be loaded, or how the text towers differ.
    """
    dtype, encoders = config.teacher.dtype, [load_teacher(model) for model in config.teacher.names]
    identities = [identify(encoder, dtype) for encoder in encoders]
    if student is not None and encoders:
        copy_towers(config.student, encoders[0], student)  # before the weights are rounded
    for encoder in encoders if dtype != "fp32" else ():
        encoder.hold_in(DTYPES[dtype])
    return LoadedTeachers(encoders, identities, config.micro_batches)


def copy_towers(config: StudentConfig, teacher: Encoder, student: Encoder) -> None:
    """Copy the teacher's towers that the student starts with. Raises: ValueError if they differ in shape."""
    for tower, source in config.weights().items():
        if source == "teacher":
            option = f"student.{tower}" + "_weights" * (getattr(config, tower) != "teacher")
            copy_tower(teacher, student, tower, option=f"{option} is teacher")


def load_teacher(model: str) -> Encoder:
    """Load one teacher with its weights as they are stored."""
    with torch.random.fork_rng(devices=[]):  # later random numbers must not depend on whether a teacher is loaded
        return load_model(model).requires_grad_(False).prefer_channels_last()


def identify(encoder: Encoder, dtype: str) -> dict[str, Any]:
    """What distinguishes a teacher from any other. encoder: not yet rounded to its dtype."""
    return {
        "sha256": encoder.weights_sha256(),
        "dtype": dtype,
        "preprocess_cfg": encoder.preprocess_config,
        "model_cfg": encoder.model_config,
        "tokens": hashlib.sha256(encoder.spec.tokenize(list(PROBES)).numpy().tobytes()).hexdigest(),
    }
