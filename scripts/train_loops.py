"""The training loops that bench_train.py compares: clipkd's, and what a user of open_clip writes. Both can step by parts."""

import math
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from torch import Tensor, nn
from webdataset.compat import WebDataset, WebLoader

from clipkd.config.parse import parse
from clipkd.training import optim
from clipkd.training.assemble import assemble
from clipkd.training.run import build_run

Lap = Callable[[str], None]
"""Called with a part's name when it is done."""
ROOT = Path(__file__).parents[1]
RECIPES = {"plain": None, "online": "openclip", "cached": "openclip", "online_gkl": "gkl", "cached_gkl": "gkl"}
SEED, RATE, DECAY, BETAS, EPS, CLIP_NORM, MIN_CROP = 0, 1e-4, 0.1, (0.9, 0.98), 1e-6, 1.0, 0.9
PREFETCH = 4
"""Batches that a loader process makes ahead, clipkd's number."""


class Task(NamedTuple):
    folder: Path
    """Of shards/, teacher/ (an open_clip folder) and cache/."""
    student: str
    batch: int
    device: str
    precision: str
    workers: int


class Clipkd:
    """The product's run, opened and stepped as `clipkd check` does it: nothing is written."""

    def __init__(self, arguments: list[str]) -> None:
        config = parse(arguments)
        self.run = build_run(config, assemble(config), dry=True)
        self.batches, self.close = self.run.feed, self.run.feed.close

    def step(self, batch: Any, lap: Lap | None = None) -> Tensor:
        return self.step_by_parts(batch, lap) if lap else self.run.step(batch)["loss"]

    def step_by_parts(self, batch: Any, lap: Lap) -> Tensor:
        """What `Learner.step` does, with the borders between its parts."""
        learner = self.run.learner
        optim.set_learning_rate(learner.optimizer, RATE)
        batch = batch.to(learner.accelerator.device)
        view, *teacher_views = learner.views.of(batch)
        lap("data")
        targets = learner.targets(batch, view, teacher_views)
        lap("teacher")
        features, _ = learner.model(view, None)
        lap("student")
        outputs = [features.image, features.text, features.logit_scale]
        leaves = [output.detach().requires_grad_() for output in outputs]
        image, text, scale = leaves
        seen = features._replace(image=image, text=text, logit_scale=scale)
        loss, _ = learner.distiller.loss(seen, targets, step=self.run.done)
        learner.accelerator.backward(loss)
        lap("loss")
        torch.autograd.backward(outputs, [leaf.grad for leaf in leaves])
        lap("student")
        learner.update(self.run.done, loss, targets, batch.keys)
        self.run.done += 1
        lap("optimizer")
        return loss.detach()


def first_tokens(tokenizer: Callable[[str], Tensor], text: str) -> Tensor:
    return tokenizer(text)[0]


def read(loader: Any) -> Generator[Any, None, None]:
    yield from loader  # whose processes start with the first batch that is asked for, as clipkd's do


class OpenClip:
    """What its users write, by the steps of open_clip's own trainer."""

    def __init__(self, task: Task) -> None:
        if open_clip.get_model_config(task.student) is None:
            open_clip.add_model_config(ROOT / "clipkd" / "models" / "configs")
        torch.manual_seed(SEED)  # the weights that clipkd's student starts with
        how: Any = {"device": task.device, "output_dict": True}
        crops = {"scale": (MIN_CROP, 1.0)}
        made: Any = open_clip.create_model_and_transforms(task.student, aug_cfg=crops, **how)
        self.model, transform, _ = made
        self.teacher: Any = open_clip.create_model(f"local-dir:{task.folder / 'teacher'}", **how).eval()
        self.loss, self.device, self.precision = open_clip.loss.DistillClipLoss(), task.device, task.precision
        decayed, plain = ([p for p in self.model.parameters() if (p.ndim < 2) == flat] for flat in (False, True))
        groups = [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS, fused=True)
        tokens = partial(first_tokens, open_clip.get_tokenizer(task.student))
        pairs = (
            WebDataset(sorted(map(str, (task.folder / "shards").glob("*.tar"))), resampled=True, shardshuffle=False)
            .shuffle(1000)
            .decode("pilrgb")
            .to_tuple("jpg", "txt")
            .map_tuple(transform, tokens)
            .batched(task.batch, partial=False)
        )
        ahead = {"prefetch_factor": PREFETCH} if task.workers else {}
        pinned = {"pin_memory": task.device == "cuda", "num_workers": task.workers}
        self.batches = read(WebLoader(pairs, batch_size=None, **pinned, **ahead))

    def step(self, batch: Any, lap: Lap | None = None) -> Tensor:
        """By parts the loss's gradients stop at the features, from where the student's start: the same numbers."""
        by_parts, lap = lap is not None, lap or (lambda _: None)
        images, texts = (part.to(self.device, non_blocking=True) for part in batch)
        lap("data")
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            student = self.model(images, texts)
            lap("student")
            with torch.no_grad():
                teacher = self.teacher(images, texts)
            lap("teacher")
            seen = {name: part.detach().requires_grad_() for name, part in student.items()} if by_parts else student
            losses = self.loss(**seen, **{f"dist_{name}": part for name, part in teacher.items()}, output_dict=True)
            loss = losses["contrastive_loss"] + losses["distill_loss"]
        loss.backward()
        lap("loss")
        if by_parts:
            torch.autograd.backward(list(student.values()), [leaf.grad for leaf in seen.values()])
            lap("student")
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
        lap("optimizer")
        return loss.detach()

    def close(self) -> None:
        self.batches.close()


def train_arguments(recipe: str | None, task: Task) -> list[str]:
    """Options of `clipkd train` that all variants share, and the recipe's."""
    chosen: dict[str, object] = {"data.path": task.folder / "shards", "data.min_crop": MIN_CROP, "steps": 10**6}
    chosen |= {"student.model": task.student, "batch_size": task.batch, "seed": SEED}
    chosen |= {"precision": task.precision, "data.num_workers": task.workers, "threads": torch.get_num_threads()}
    chosen |= {"optim.learning_rate": RATE, "optim.weight_decay": DECAY, "optim.clip_norm": CLIP_NORM}
    chosen |= {"optim.betas": list(BETAS)}
    chosen |= {"teacher.models": f"local-dir:{task.folder / 'teacher'}"} if recipe else {}
    config = [f"--config={ROOT / 'configs' / 'losses' / recipe}.yaml"] if recipe else []
    return [*config, *(f"--{name}={value}" for name, value in chosen.items())]


def open_clipkd(variant: str, task: Task) -> Clipkd:
    cache = [f"--teacher.cache={task.folder / 'cache'}"] if variant.startswith("cached") else []
    return Clipkd([*train_arguments(RECIPES[variant], task), *cache])


def open_loop(variant: str, task: Task) -> Clipkd | OpenClip:
    return OpenClip(task) if variant == "open_clip" else open_clipkd(variant, task)


def first_batch(variant: str, task: Task) -> Any:
    """The same pixels and tokens for every variant, as its step takes them."""
    loop = open_clipkd("plain" if variant == "open_clip" else variant, task._replace(workers=0))
    batch = next(loop.batches)
    views = loop.run.learner.views
    view = views.of(batch)[0]
    return (views.specs[0].normalize(view.images), view.texts) if variant == "open_clip" else batch
