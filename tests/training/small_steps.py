"""A learner of the demo's models for any options of `clipkd train`, with batches of random pixels, and no data set."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipkd.config.parse import parse
from clipkd.config.train import StudentConfig, TrainConfig
from clipkd.models.encoder import Encoder
from clipkd.models.initial import create_student, initial_student
from clipkd.models.students import find_student_config
from clipkd.objective.memory import MovingAverage
from clipkd.teachers.loaded import LoadedTeachers
from clipkd.training.assemble import Parts, make_distiller, make_optimizer
from clipkd.training.learner import Learner
from clipkd.views import Batch, Views
from tests.models.test_initial import TIMM, text_folder, trunk_weights, write

PAIRS, CLASSES = 8, ("cat", "dog", "bird")
ALL_MEMORY = (
    *("queue=2", "gkl.weight=1", "icl.weight=1", "itc.weight=0.3", "itc.teacher_share=0.2", "closed_set.weight=1"),
    *("logit_scale.teacher=30.0", "gd.weight=10"),
)
"""A queue of both kinds, a moving average, class prompts with a prior, and a fixed logit scale of the teacher."""


def with_all_memory(folder: Path) -> list[str]:
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    options = [f"--objective.{option}" for option in ALL_MEMORY]
    options += ["--objective.closed_set.classes", str(folder / "classes.txt"), "--data.label_key", "label"]
    return [*options, "--optim.ema_momentum", "0.9", "--teacher.models", "x"]


def read(options: Sequence[str]) -> TrainConfig:
    sizes = ("--student.model", "tiny-student", "--batch_size", str(PAIRS), "--steps", "4", "--data.path", "x")
    return parse([*sizes, *options])


def lit(folder: Path) -> list[str]:
    """The recipe of frozen towers, a timm one and a transformers one, from files of weights that are made here."""
    torch.save(trunk_weights(), folder / "trunk.pt")
    texts = text_folder(folder / "texts")
    text = {"hf_model_name": texts, "hf_tokenizer_name": texts, "hf_proj_type": "linear", "context_length": 6}
    text["hf_pooler_type"] = "mean_pooler"
    model = write(folder, vision_cfg=TIMM, text_cfg=text, custom_text=True)
    weights = ["--student.image_weights", str(folder / "trunk.pt"), "--student.text_weights", texts]
    return ["--config", "lit", "--student.model", model, *weights]


def create_teacher() -> Encoder:
    """Of another width and resolution than the demo's student, with random weights."""
    found = find_student_config("tiny-teacher")
    assert found is not None
    sizes = found[1] | {"embed_dim": 96, "vision_cfg": found[1]["vision_cfg"] | {"image_size": 40}}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "teacher.json").write_text(json.dumps(sizes))
        return create_student(StudentConfig(model=f"{folder}/teacher.json"))


def make_teachers(config: TrainConfig) -> LoadedTeachers:
    torch.manual_seed(1)
    encoders = [create_teacher().eval().requires_grad_(False).prefer_channels_last() for _ in config.teacher.names]
    return LoadedTeachers(encoders, [{} for _ in encoders], config.micro_batches)


def make_learner(config: TrainConfig, accelerator: Any, output: Path) -> Learner:
    """As `build_run` makes it."""
    student, teachers = initial_student(config), make_teachers(config)
    distiller = make_distiller(config, Parts(accelerator, student, None, teachers, []))  # type: ignore[arg-type]
    ema = MovingAverage(distiller.student, config.optim.ema_momentum) if config.optim.ema_momentum else None
    model, optimizer = accelerator.prepare(distiller, make_optimizer(distiller, config))
    object.__setattr__(config, "output", str(output))
    views = Views([student.spec, *(encoder.spec for encoder in teachers.encoders)])
    return Learner(config, accelerator, distiller, model, optimizer, ema, teachers, views, start=0, dry=False)


def make_batch(views: Views, number: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    captions = [f"a {word} of {number} and {pair}" for pair, word in enumerate((*CLASSES, *CLASSES, "x", "y"))]

    def pixels(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    return Batch(
        tuple(pixels(PAIRS, 3, *spec.size) for spec in views.pixel_specs),
        tuple(spec.tokenize(captions) for spec in views.token_specs),
        ids=PAIRS * number + torch.arange(PAIRS),
        labels=torch.arange(PAIRS) % len(CLASSES),
        keys=tuple(f"shard.tar/{number}-{pair}" for pair in range(PAIRS)),
    )
