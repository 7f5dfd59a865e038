"""Prints by how much compiled panels and terms differ from those that are not, as one JSON object."""

import dataclasses
import json
from typing import Any

import torch
from torch import Tensor

from clipkd.losses import query_statistics
from tests.objective.tiny_clip import OBJECTIVES, make_batch, make_distiller, needs, take_loss


def statistics(compiled: bool) -> dict[str, Tensor]:
    """Against constant keys, and against keys that get a gradient."""
    _, targets = make_batch(dtype=torch.float64)
    image, text = targets.teachers[0].image, targets.teachers[0].text
    scale, results = torch.tensor(8.0, dtype=torch.float64, requires_grad=True), {}
    for kind, gamma in (("constant", 0.4), ("moving", None)):
        queries, keys = image.clone().requires_grad_(), text.clone().requires_grad_(kind == "moving")
        options: dict[str, Any] = {"logit_scale": scale, "teacher_logit_scale": 5.0, "gamma": gamma, "tile_size": 6}
        options["temperature"] = 1.5
        rows: Any = query_statistics(queries, keys, text, image, compiled=compiled, **options)
        values = torch.stack([rows.ce, rows.kl if gamma is None else rows.variance])
        leaves = [queries, scale] if kind == "constant" else [queries, scale, keys]
        found = [values.detach(), *torch.autograd.grad(values.square().sum(), leaves)]
        results |= {f"fused {kind} {number}": each for number, each in enumerate(found)}
    return results


def terms(compiled: bool) -> dict[str, Tensor]:
    objective = dataclasses.replace(OBJECTIVES["teacher keys"], compile=compiled, tile_size=6)
    distiller = make_distiller(objective, dtype=torch.float64)
    view, targets = make_batch(dtype=torch.float64)
    loss, _ = take_loss(distiller, view, needs("teacher keys", targets))
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
