"""A CLIP of a few hundred weights and batches for it, and one step of the objective on one process's share."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkd.config import FeatureConfig, GKLConfig, InfoNCEConfig, ObjectiveConfig, SoftTargetConfig
from clipkd.distill import Distiller
from clipkd.models import Encoder
from clipkd.views import Features, View

STUDENT_WIDTH, TEACHER_WIDTH, PAIRS = 6, 9, 8

OFF = InfoNCEConfig(weight=0.0)
OBJECTIVES = {
    "every term": ObjectiveConfig(
        info_nce=InfoNCEConfig(weight=0.5),
        gkl=GKLConfig(weight=1.5, keys="teacher", gamma=0.3, ce_weight=0.7, mse_weight=0.2, row_weight="reference"),
        kl=SoftTargetConfig(weight=2.0, keys="student"),
        soft_ce=SoftTargetConfig(weight=0.3, keys="teacher", temperature=2.0, scale_by_temperature_squared=True),
        features=FeatureConfig(weight=10.0),
    ),
    "gkl on student keys": ObjectiveConfig(
        info_nce=OFF, gkl=GKLConfig(weight=1.0, keys="student", gamma=0.05, weight_temperature=2.0)
    ),
    "gkl with equal rows": ObjectiveConfig(gkl=GKLConfig(weight=1.0, gamma=1.0, row_weight="uniform")),
    "features alone": ObjectiveConfig(info_nce=OFF, features=FeatureConfig(weight=1.0)),
    "task alone": ObjectiveConfig(),
}


class Towers(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
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

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(self.image_tower(self.model, images), dim=-1)

    def encode_text(self, texts: Tensor) -> Tensor:
        return F.normalize(self.text_tower(self.model, texts), dim=-1)


def make_encoder(width: int = STUDENT_WIDTH, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    preprocess: dict[str, Any] = {
        "size": 2,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "interpolation": "bicubic",
    }
    return (DoubleEncoder if dtype == torch.float64 else Encoder)(
        Towers(width).to(dtype),
        name="tiny",
        image_tower=lambda towers, images: towers.visual(images),
        text_tower=lambda towers, texts: towers.encode_text(texts),
        preprocess_config=preprocess,
        tokenize=lambda texts: torch.zeros(len(texts), 3, dtype=torch.long),
        tokenizer_name="none",
        dim=width,
    )


def make_distiller(
    objective: ObjectiveConfig, *, dtype: torch.dtype, teacher_dim: int | None = TEACHER_WIDTH
) -> Distiller:
    encoder = make_encoder(dtype=dtype)
    return Distiller(encoder, objective, teacher_dim=teacher_dim).to(dtype)


def make_batch(*, dtype: torch.dtype, teacher_dim: int = TEACHER_WIDTH, num: int = PAIRS) -> tuple[View, Features]:
    """Random inputs of the student, and unit vectors as the teacher's features of the same pairs."""
    generator = torch.Generator().manual_seed(7)
    view = View(
        torch.randn(num, 3, 2, 2, generator=generator, dtype=dtype), torch.randint(0, 12, (num, 3), generator=generator)
    )
    image, text = (
        F.normalize(torch.randn(num, teacher_dim, generator=generator, dtype=dtype), dim=1) for _ in range(2)
    )
    return view, Features(image, F.normalize(0.7 * image + text, dim=1), torch.tensor(12.0, dtype=dtype))


def share(view: View, teacher: Features, rank: int, world_size: int) -> tuple[View, Features]:
    size = len(view.images) // world_size
    rows = slice(rank * size, (rank + 1) * size)
    return View(view.images[rows], view.texts[rows]), teacher._replace(
        image=teacher.image[rows], text=teacher.text[rows]
    )


def step(name: str, dtype: torch.dtype, *, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
    """Loss, logged terms and every gradient of one step on one process's share of the batch."""
    distiller = make_distiller(OBJECTIVES[name], dtype=dtype)
    model = distiller if world_size == 1 else nn.parallel.DistributedDataParallel(distiller)
    loss, metrics = model(*share(*make_batch(dtype=dtype), rank, world_size))
    loss.backward()
    gradients = {}
    for parameter_name, parameter in distiller.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            gradients[f"gradient/{parameter_name}"] = parameter.grad
    return {**{f"metric/{key}": value.detach() for key, value in metrics.items()}, **gradients}
