"""A CLIP of a few hundred weights and batches for it, and one step of the objective on one process's share."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkd.config import terms
from clipkd.config.objective import LogitScaleConfig, ObjectiveConfig
from clipkd.config.parse import parse
from clipkd.models.encoder import Encoder
from clipkd.objective.closed_set import ClosedSet
from clipkd.objective.comparison import Targets
from clipkd.objective.distiller import Distiller
from clipkd.training import grad_cache
from clipkd.views import Features, View

STUDENT_WIDTH, TEACHER_WIDTH, PAIRS = 6, 9, 8

OFF = terms.InfoNCETerm(weight=0.0)
QUEUE_CAPACITY = 19
OBJECTIVES = {
    "teacher keys": ObjectiveConfig(
        info_nce=terms.InfoNCETerm(weight=0.5),
        gkl=terms.GKLTerm(weight=1.5, gamma=0.3, ce_weight=0.7, mse_weight=0.2),
        kl=terms.KLTerm(weight=0.3, temperature=2.0),
        features=terms.FeaturesTerm(weight=10.0),
    ),
    "student keys": ObjectiveConfig(
        keys="student",
        info_nce=OFF,
        gkl=terms.GKLTerm(weight=1.0, gamma=0.05),
        kl=terms.KLTerm(weight=2.0),
    ),
    "features alone": ObjectiveConfig(info_nce=OFF, features=terms.FeaturesTerm(weight=1.0)),
    "task alone": ObjectiveConfig(),
    "relations": ObjectiveConfig(
        features=terms.FeaturesTerm(weight=3.0),
        icl=terms.ICLTerm(weight=0.7),
        gd=terms.GDTerm(weight=50.0),
        afd=terms.AFDTerm(weight=0.9),
        vrd=terms.VRDTerm(weight=0.8),
        xrd=terms.XRDTerm(weight=1.2),
        warmup_steps=10,
    ),
    "queued teacher keys": ObjectiveConfig(
        queue=2,
        info_nce=terms.InfoNCETerm(weight=0.5),
        gkl=terms.GKLTerm(weight=1.0, mse_weight=0.3),
        itc=terms.ITCTerm(weight=1.1, momentum_share=0.3, teacher_share=0.2),
        icl=terms.ICLTerm(weight=0.7),
    ),
    "queued student keys": ObjectiveConfig(
        keys="student",
        queue=2,
        info_nce=terms.InfoNCETerm(weight=0.5),
        kl=terms.KLTerm(weight=0.6, temperature=2.0),
        affinity=terms.AffinityTerm(weight=0.2),
    ),
    "queued momentum keys": ObjectiveConfig(
        keys="momentum", queue=2, info_nce=OFF, gkl=terms.GKLTerm(weight=0.4, gamma=0.5), kl=terms.KLTerm(weight=0.1)
    ),
    # Both shares are 0 at first: the queue is then the only one to ask for the teacher's keys.
    "ramped": ObjectiveConfig(
        queue=2, warmup_steps=2, info_nce=OFF, itc=terms.ITCTerm(weight=1.0, momentum_share=0.3, teacher_share=0.2)
    ),
    "sigmoid": ObjectiveConfig(
        keys="student", info_nce=OFF, sigmoid=terms.SigmoidTerm(weight=0.5), soft_bce=terms.SoftBCETerm(weight=0.5)
    ),
    "queued sigmoid": ObjectiveConfig(queue=2, info_nce=OFF, soft_bce=terms.SoftBCETerm(weight=0.5)),
    "closed set": ObjectiveConfig(
        info_nce=OFF,
        closed_set=terms.ClosedSetTerm(weight=1.0, classes="x"),
        gkl=terms.GKLTerm(gamma=0.5, mse_weight=0.4),
        logit_scale=LogitScaleConfig(teacher=9.0),
    ),
    "two teachers": ObjectiveConfig(
        keys="student", kl=terms.KLTerm(weight=1.0, temperature=2.0), logit_scale=LogitScaleConfig(teacher=(9.0, 12.0))
    ),
}
NUM_CLASSES = 5
TEACHERLESS = ("albef", "demo", "demo_teacher", "lit", "tiny", "tiny_teacher")
FROZEN = ("demo", "demo_teacher", "lit")
"""Their towers start from files of weights."""


def objective_of(recipe: str) -> ObjectiveConfig:
    """The objective of a file of configs/, as `clipkd train` reads it."""
    teacher = [] if recipe in TEACHERLESS else ["--teacher.models", "x"]
    weights = ["--student.image_weights", "x", "--student.text_weights", "x"] if recipe in FROZEN else []
    return parse(["--config", recipe, *teacher, *weights]).objective


class Towers(nn.Module):
    def __init__(self, width: int, *, bias: bool) -> None:
        super().__init__()
        if bias:
            self.logit_bias = nn.Parameter(torch.tensor(-3.0))
        self.visual = nn.Sequential(nn.Flatten(), nn.Linear(3 * 2 * 2, 8), nn.Tanh(), nn.Linear(8, width))
        self.token_embedding = nn.Embedding(12, 8)
        self.text_projection = nn.Linear(8, width)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_text(self, texts: Tensor) -> Tensor:
        return self.text_projection(torch.tanh(self.token_embedding(texts).sum(dim=1)))


class DoubleEncoder(Encoder):
    """Without the cast to float32, so that a comparison can be tight."""

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale.exp()  # type: ignore[union-attr, operator]

    @property
    def logit_bias(self) -> Tensor | None:
        return getattr(self.model, "logit_bias", None)

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(self.image_tower(self.model, images), dim=-1)

    def encode_text(self, texts: Tensor) -> Tensor:
        return F.normalize(self.text_tower(self.model, texts), dim=-1)


def make_encoder(
    width: int = STUDENT_WIDTH, *, dtype: torch.dtype = torch.float32, seed: int = 0, bias: bool = False
) -> Encoder:
    torch.manual_seed(seed)
    preprocess: dict[str, Any] = {
        "size": 2,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "interpolation": "bicubic",
    }
    return (DoubleEncoder if dtype == torch.float64 else Encoder)(
        Towers(width, bias=bias).to(dtype),
        name="tiny",
        image_tower=lambda towers, images: towers.visual(images),
        text_tower=lambda towers, texts: towers.encode_text(texts),
        preprocess_config=preprocess,
        tokenize=lambda texts: torch.zeros(len(texts), 3, dtype=torch.long),
        tokenizer_name="none",
        dim=width,
    )


def make_distiller(
    objective: ObjectiveConfig,
    *,
    dtype: torch.dtype,
    teacher_dim: int | None = TEACHER_WIDTH,
    frozen_text: bool = False,
) -> Distiller:
    """With a queue and a closed set of random classes if the objective has them, all in one precision."""
    encoder = make_encoder(dtype=dtype, bias=objective.needs_bias)
    if frozen_text:
        encoder.freeze("text")
    closed_set = None
    if objective.closed_set.weight:
        generator = torch.Generator().manual_seed(11)
        prompts = [torch.randint(0, 12, (NUM_CLASSES, 3), generator=generator) for _ in range(2)]
        assert teacher_dim is not None
        classes = F.normalize(torch.randn(NUM_CLASSES, teacher_dim, generator=generator, dtype=dtype), dim=1)
        closed_set = ClosedSet(prompts, classes, class_prior=objective.closed_set.class_prior)
    distiller = Distiller(
        encoder, objective, teacher_dim=teacher_dim, queue_capacity=QUEUE_CAPACITY, closed_set=closed_set
    ).to(dtype)
    if distiller.queue is not None:
        distiller.queue.rings = {name: ring.to(dtype) for name, ring in distiller.queue.rings.items()}
    return distiller


def make_batch(
    *, dtype: torch.dtype, teacher_dim: int = TEACHER_WIDTH, num: int = PAIRS, number: int = 0
) -> tuple[View, Targets]:
    """Random inputs of the student, and unit vectors as the features of teachers and average. Some ids and labels repeat."""
    generator = torch.Generator().manual_seed(7 + number)
    view = View(
        torch.randn(num, 3, 2, 2, generator=generator, dtype=dtype), torch.randint(0, 12, (num, 3), generator=generator)
    )
    image, text = (
        F.normalize(torch.randn(num, teacher_dim, generator=generator, dtype=dtype), dim=1) for _ in range(2)
    )
    bias = torch.tensor(-5.0, dtype=dtype)
    teacher = Features(image, F.normalize(0.7 * image + text, dim=1), torch.tensor(12.0, dtype=dtype), bias)
    second, average = (
        Features(
            F.normalize(torch.randn(num, width, generator=generator, dtype=dtype), dim=1),
            F.normalize(torch.randn(num, width, generator=generator, dtype=dtype), dim=1),
            torch.tensor(7.0, dtype=dtype),
        )
        for width in (4, STUDENT_WIDTH)
    )
    ids = (5 * number + torch.arange(num)) % 23
    labels = torch.randint(-1, NUM_CLASSES, (num,), generator=generator)
    return view, Targets((teacher, second), average, ids, labels)


def share(view: View, targets: Targets, rank: int, world_size: int) -> tuple[View, Targets]:
    size = len(view.images) // world_size
    rows = slice(rank * size, (rank + 1) * size)

    def cut(features: Features) -> Features:
        return features._replace(image=features.image[rows], text=features.text[rows])

    return View(view.images[rows], view.texts[rows]), Targets(
        teachers=tuple(cut(teacher) for teacher in targets.teachers),
        momentum=None if targets.momentum is None else cut(targets.momentum),
        ids=None if targets.ids is None else targets.ids[rows],
        labels=None if targets.labels is None else targets.labels[rows],
    )


def needs(name: str, targets: Targets) -> Targets:
    """A batch with as many teachers as an objective has."""
    return targets if name == "two teachers" else targets._replace(teachers=targets.teachers[:1])


def take_loss(
    distiller: Distiller, view: View, targets: Targets, step: int = 0, *, model: nn.Module | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """As a training step takes it; model: the distiller inside DDP."""
    student, classes = (model or distiller)(view, distiller.prompts_at(step))
    return distiller.loss(student, targets, step=step, class_features=classes)


def steps(
    name: str,
    dtype: torch.dtype,
    *,
    rank: int = 0,
    world_size: int = 1,
    number: int = 3,
    tile_size: int | None = None,
    micro_batches: int = 1,
    pairs: int = PAIRS,
    frozen_text: bool = False,
) -> dict[str, Tensor]:
    """Series, gradients and memory after some steps on one process's share of the batches."""
    objective = dataclasses.replace(OBJECTIVES.get(name) or objective_of(name), tile_size=tile_size)
    distiller = make_distiller(objective, dtype=dtype, frozen_text=frozen_text)
    model = distiller if world_size == 1 else nn.parallel.DistributedDataParallel(distiller)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    metrics: dict[str, Tensor] = {}
    for step in range(number):
        optimizer.zero_grad()
        view, targets = make_batch(dtype=dtype, number=step, num=pairs)
        own = share(view, needs(name, targets), rank, world_size)
        if micro_batches == 1:
            loss, metrics = take_loss(distiller, *own, step, model=model)
            loss.backward()
        else:
            _, metrics = grad_cache.backward(
                distiller, *own, step=step, micro_batches=micro_batches, reseed=torch.manual_seed, model=model
            )
        if step < number - 1:
            optimizer.step()
        distiller.clamp_logit_scales()
        distiller.finish_step()
    gradients = {}
    for parameter_name, parameter in distiller.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            gradients[f"gradient/{parameter_name}"] = parameter.grad
    memory = {f"memory/{key}": value for key, value in distiller.memory().items()}
    return {**{f"metric/{key}": value.detach() for key, value in metrics.items()}, **gradients, **memory}
