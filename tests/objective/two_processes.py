"""One of the two processes of test_distributed.py: two_processes.py RANK FOLDER writes what it saw to FOLDER/RANK.*."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from clipkd import distributed
from clipkd.config import shipped
from clipkd.training import grad_cache
from clipkd.views import join
from tests.objective.tiny_clip import OBJECTIVES, make_batch, make_distiller, needs, share, steps, take_loss
from tests.processes import joined

WORLD_SIZE = 2
RECIPES = sorted(path.stem for path in shipped.RECIPES.rglob("*.yaml"))


def collectives(rank: int) -> tuple[dict[str, Tensor], dict]:
    """Every function of clipkd.distributed on numbers that tell the processes apart."""
    rows = torch.tensor([[1.0], [2.0]]) + 2 * rank
    rows.requires_grad_()
    gathered = distributed.gather(rows)
    weights = torch.tensor([[1.0], [10.0], [100.0], [1000.0]]) * (1 + rank)
    loss = (weights * gathered).sum()
    (gradient,) = torch.autograd.grad(loss, rows, retain_graph=True)
    (again,) = torch.autograd.grad(loss, rows)
    # Addition hands one gradient tensor to both of its inputs.
    other = torch.zeros(4, 1, requires_grad=True)
    both = ((distributed.gather(rows) + other) * weights).sum()
    gradient_in_sum, other_gradient = torch.autograd.grad(both, (rows, other))
    tensors = {
        "gathered": gathered,
        "gradient": gradient,
        "gradient of a second backward": again,
        "gradient in a sum": gradient_in_sum,
        "gradient of the other summand": other_gradient,
        "gathered integers": distributed.gather_constant(torch.tensor([rank, 5])),
        "gathered transposed": distributed.gather_constant(torch.tensor([[0.0, 2.0], [1.0, 3.0]]).T + 10 * rank),
        "gathered cube": distributed.gather_constant(torch.full((1, 2, 3), float(rank))),
        "sum of own rows": distributed.sum_of_own_rows(weights),
        "mean": distributed.mean(torch.tensor([1.0, 10.0]) * (1 + 2 * rank)),
    }
    buffers = [torch.tensor([1.5 + rank]), torch.tensor(7 + rank), torch.tensor([rank == 0])]
    buffers += [torch.full((2, 3), 4.0 + rank).T]
    distributed.copy_from_main(buffers)
    tensors |= {f"buffer {number}": buffer.contiguous() for number, buffer in enumerate(buffers)}
    constant = distributed.gather_constant(rows)
    with pytest.raises(ValueError, match="contiguous"):  # the rules are in force
        dist.all_gather([torch.empty(2, 3).T, torch.empty(2, 3).T], torch.ones(3, 2))
    distiller = make_distiller(OBJECTIVES["teacher keys"], dtype=torch.float64)
    facts = {
        "world_size": distributed.world_size(),
        "rank": distributed.rank(),
        "objects": distributed.gather_objects({"rank": rank}),
        "agreed": agreed(rank),
        "together": distributed.together(lambda: rank),
        "problem": message(lambda: distributed.together(lambda: rank if rank == 0 else int("no number"))),
        "uneven": message(lambda: take_loss(distiller, *make_batch(dtype=torch.float64, num=4 + rank))),
        "exchanges": [exchanges(rank, micro_batches) for micro_batches in (1, 2, 4)],
        "constant_requires_grad": constant.requires_grad,
    }
    return tensors, facts


def agreed(rank: int) -> list[int]:
    """What a process hears after each of four steps; 9 and 15 are given in the second, one process each."""
    agreement = distributed.Agreement()
    return [agreement.on(number) for number in (0, (9, 15)[rank], 0, 0)]


def exchanges(rank: int, micro_batches: int) -> int:
    """How often a step with micro-batches sends gradients from process to process."""
    distiller = make_distiller(OBJECTIVES["teacher keys"], dtype=torch.float64)
    model = torch.nn.parallel.DistributedDataParallel(distiller)
    calls: list[int] = []

    def count(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        calls.append(bucket.index())
        return default_hooks.allreduce_hook(dist.group.WORLD, bucket)

    model.register_comm_hook(None, count)
    own = share(*make_batch(dtype=torch.float64), rank, WORLD_SIZE)
    grad_cache.backward(distiller, *own, step=0, micro_batches=micro_batches, reseed=torch.manual_seed, model=model)
    return len(calls)


def dropped(rank: int) -> dict[str, Tensor]:
    """Gradients of micro-batches with dropout, and of the same masks in one piece with gradients averaged by hand."""
    found: dict[str, Tensor] = {}
    view, targets = share(*make_batch(dtype=torch.float64), rank, WORLD_SIZE)
    targets = needs("teacher keys", targets)
    for way in ("parts", "whole"):
        distiller = make_distiller(OBJECTIVES["teacher keys"], dtype=torch.float64)
        visual = distiller.student.model.visual
        assert isinstance(visual, torch.nn.Sequential)
        visual.insert(2, torch.nn.Dropout(0.5))

        def reseed(number: int) -> None:
            torch.manual_seed(10 * number + rank)

        if way == "parts":
            model = torch.nn.parallel.DistributedDataParallel(distiller)
            grad_cache.backward(distiller, view, targets, step=0, micro_batches=4, reseed=reseed, model=model)
        else:
            outputs = []
            for number, part in enumerate(view.split(4)):
                reseed(number)
                outputs.append(distiller(part)[0])
            distiller.loss(join(outputs), targets)[0].backward()
        for name, parameter in distiller.named_parameters():
            if parameter.grad is not None:
                mean = parameter.grad if way == "parts" else distributed.mean(parameter.grad)
                found[f"dropped {way}/{name}"] = mean
    return found


def message(call: Callable[[], object]) -> str:
    """Of the ValueError that this process gets."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    with joined(rank, folder):
        tensors, facts = compute(rank)
    save_file({key: value.detach().clone() for key, value in tensors.items()}, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(facts), encoding="utf-8")


def compute(rank: int) -> tuple[dict[str, Tensor], dict]:
    tensors, facts = collectives(rank)
    for name in OBJECTIVES:
        for dtype in (torch.float32, torch.float64):
            result = steps(name, dtype, rank=rank, world_size=WORLD_SIZE)
            tensors |= {f"{name}/{dtype}/{key}": value for key, value in result.items()}
        forms: dict[str, dict[str, Any]] = {
            "panels": {"tile_size": 2},
            "micro-batches": {"micro_batches": 3},
            "panels of micro-batches": {"tile_size": 2, "micro_batches": 3},
            "frozen text": {"frozen_text": True},
            "frozen text in parts": {"frozen_text": True, "tile_size": 2, "micro_batches": 3},
        }
        for form, options in forms.items():
            result = steps(name, torch.float64, rank=rank, world_size=WORLD_SIZE, **options)
            tensors |= {f"{name}/{form}/{key}": value for key, value in result.items()}
    for name in RECIPES:
        result = steps(name, torch.float64, rank=rank, world_size=WORLD_SIZE)
        tensors |= {f"{name}/recipe/{key}": value for key, value in result.items()}
    tensors |= dropped(rank)
    # More parts than classes: the last brings no prompts, and DDP waits for the text tower all the same.
    result = steps("closed set", torch.float64, rank=rank, world_size=WORLD_SIZE, micro_batches=8, pairs=16)
    tensors |= {f"parts without prompts/{key}": value for key, value in result.items()}
    return tensors, facts


if __name__ == "__main__":
    main()
