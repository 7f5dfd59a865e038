"""Prints by how much compiled tiles and terms differ from those that are not, as one JSON object."""

import dataclasses
import json

import torch
from torch import Tensor

from clipkd.losses import similarity_statistics
from tests.objective.tiny_clip import OBJECTIVES, make_batch, make_distiller, needs, take_loss


def statistics(compiled: bool) -> dict[str, Tensor]:
    _, targets = make_batch(dtype=torch.float64)
    features = targets.teachers[0]
    leaves = {
        "image": features.image.clone().requires_grad_(),
        "text": features.text.clone().requires_grad_(),
        "scale": torch.tensor(8.0, dtype=torch.float64, requires_grad=True),
    }
    found = similarity_statistics(
        *(leaves["image"], leaves["text"], features.text, features.image),
        logit_scale=leaves["scale"],
        teacher_logit_scale=5.0,
        gamma=0.4,
        compiled=compiled,
    )
    ways = found.image_to_text, found.text_to_image
    values = torch.stack([getattr(way, name) for way in ways for name in ("ce", "kl", "variance", "info_nce")])
    gradients = torch.autograd.grad(values.square().sum(), list(leaves.values()))
    return {"values": values.detach(), **dict(zip(leaves, gradients, strict=True))}


def terms(compiled: bool) -> dict[str, Tensor]:
    objective = dataclasses.replace(OBJECTIVES["every term"], compile=compiled, tile_size=6)
    distiller = make_distiller(objective, dtype=torch.float64)
    view, targets = make_batch(dtype=torch.float64)
    loss, _ = take_loss(distiller, view, needs("every term", targets))
    loss.backward()
    names = ("student.model.visual.1.weight", "image_projection.weight")
    gradients = {name: distiller.get_parameter(name).grad for name in names}
    return {"loss": loss.detach(), **{name: each for name, each in gradients.items() if each is not None}}


def main() -> None:
    errors: dict[str, float] = {}
    for make in (statistics, terms):
        plain, fused = make(False), make(True)
        errors |= {name: ((fused[name] - plain[name]).norm() / plain[name].norm()).item() for name in plain}
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
