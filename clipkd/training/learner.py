"""One optimizer step: learning rate, targets, loss, gradients, update, verdict, moving average, queue."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from clipkd import distributed, files
from clipkd.config.train import TrainConfig
from clipkd.models import run_folder
from clipkd.models.encoder import Encoder
from clipkd.objective.comparison import Targets
from clipkd.objective.distiller import Distiller, Metrics
from clipkd.objective.memory import MovingAverage
from clipkd.teachers.cached import Teachers
from clipkd.training import grad_cache, optim
from clipkd.views import Batch, View, Views, join


@dataclass
class Learner:
    """The student of this process, and all that a step reads or changes."""

    config: TrainConfig
    accelerator: Accelerator
    distiller: Distiller
    model: nn.Module
    """`distiller` as Accelerate wraps it."""
    optimizer: Any
    """AdamW as Accelerate wraps it."""
    ema: MovingAverage[Encoder] | None
    teachers: Teachers
    views: Views
    start: int
    """The first step that this process takes."""
    dry: bool
    """Whether steps are only tried: then a failed step writes no record."""
    unfinished: "Taken | None" = None
    """The last step, until `finish_step` has read its verdict."""

    def step(self, batch: Batch, step: int) -> Metrics:
        """Take step 0, 1, … on this process's share of the global batch; the metrics stay on the device.

        The device skips the update if the loss or the gradient is not finite; the next `finish_step` raises.

        Raises: as `finish_step`, of the step before; ValueError for a label beyond the closed set.
        """
        self.require_known_labels(batch)
        options = self.config.optim
        rate = optim.learning_rate(
            step, peak=options.learning_rate, warmup_steps=options.warmup_steps, steps=self.config.steps
        )
        optim.set_learning_rate(self.optimizer, rate)
        batch = batch.to(self.accelerator.device)
        view, *teacher_views = self.views.of(batch)
        view = self.teachers.student_view(batch, view)
        targets = self.targets(batch, view, teacher_views)
        del teacher_views  # as large as the student's
        loss, metrics = self.backward(view, targets, step)
        if step == self.start:
            require_all_trained(self.distiller)
        norm = self.update(step, loss, targets, batch.keys)
        return {**metrics, "grad_norm": norm, "lr": torch.tensor(rate)}

    def require_known_labels(self, batch: Batch) -> None:
        """Raises: ValueError for a label beyond the closed set. batch: still on the CPU."""
        closed_set = self.distiller.closed_set
        if closed_set is not None and (largest := int(batch.labels.max())) >= len(closed_set.teacher_classes):
            raise ValueError(
                f"{batch.keys[int(batch.labels.argmax())]} has class {largest} by data.label_key, but "
                f"objective.closed_set.classes names {len(closed_set.teacher_classes)}, numbered from 0; name them all, or "
                "leave that image out"
            )

    @torch.no_grad()
    def targets(self, batch: Batch, view: View, teacher_views: list[View]) -> Targets:
        """Features of the teachers and the moving average. Finishes the step before, see `finish_step`."""
        with self.accelerator.autocast():
            teachers, momentum = self.teachers.features(batch, teacher_views), None
            self.finish_step()  # here, where the device has the teachers' work to do meanwhile
            if self.distiller.needs_momentum:
                assert self.ema is not None
                momentum = join([self.ema.model.features(part) for part in view.split(self.config.micro_batches)])
        return Targets(teachers, momentum, batch.ids, batch.labels)

    def backward(self, view: View, targets: Targets, step: int) -> tuple[Tensor, Metrics]:
        """Loss and metrics of this process's share; leaves gradients in the parameters, averaged over processes."""
        distiller, parts = self.distiller, self.config.micro_batches

        def reseed(*micro_batch: int) -> None:
            """Make dropout a function of seed, step, process and micro-batch: a resumed run needs no random state."""
            sequence = np.random.SeedSequence((self.config.seed, step, distributed.rank(), *micro_batch))
            torch.manual_seed(int(sequence.generate_state(1)[0]))

        if parts > 1:
            return grad_cache.backward(
                *(distiller, view, targets),
                step=step,
                micro_batches=parts,
                reseed=reseed,
                model=self.model,
                start_backward=self.accelerator.backward,
            )
        reseed()
        student, classes = self.model(view, distiller.prompts_at(step))
        loss, metrics = distiller.loss(student, targets, step=step, class_features=classes)
        self.accelerator.backward(loss)
        return loss, metrics

    def clip(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip the gradients; returns their norm before that, and whether the step failed, without waiting for either."""
        scaler = self.accelerator.scaler
        if scaler is not None:
            # Under fp16 the scaler searches its scale through infinite norms: it skips those steps, and only a loss that is
            # not finite has failed. The mean, so that all processes agree; 0 times it makes the scaler skip such a step.
            loss = distributed.mean(loss)
            gradient = next(p.grad for p in self.distiller.parameters() if p.grad is not None)
            gradient.add_(0 * loss)
        norm = self.accelerator.clip_grad_norm_(self.distiller.parameters(), self.config.optim.clip_norm or math.inf)
        assert norm is not None
        if scaler is not None and (scale := scaler._get_scale_async()) is not None:
            return norm, ~loss.isfinite() | (scale < 1)
        # DDP averages gradients, so one process's NaN is in every process's norm and all stop together.
        return norm, ~norm.isfinite()

    def update(self, step: int, loss: Tensor, targets: Targets, keys: tuple[str, ...]) -> Tensor:
        """Clip the gradients and update the weights; returns the norm before that."""
        norm, failed = self.clip(loss)
        # 1 makes the fused kernel leave weights, moments and their count as they are.
        self.optimizer.optimizer.found_inf = failed.float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.distiller.clamp_logit_scales()
        self.unfinished = Taken(step, Verdict(failed), loss.detach(), norm, targets, keys)
        return norm

    def finish_step(self) -> None:
        """Read the last step's verdict; if it is good, update the moving average, the queue and the class prior.

        Call it before anything reads these. Waits until the device has that step's gradient.

        Raises: FloatingPointError on every process, after writing the batch's keys to RUN/nonfinite_step_N.json.
        """
        taken, self.unfinished = self.unfinished, None
        if taken is None:
            return
        if taken.verdict.failed():
            self.stop(taken)
        self.distiller.finish_step()
        if self.ema is not None:
            self.ema.update()

    def stop(self, taken: "Taken") -> NoReturn:
        """Raises: FloatingPointError."""
        loss, norm, step = taken.loss.item(), taken.norm.item(), taken.step + 1
        parts = distributed.gather_objects((loss, taken.keys, find_nonfinite(taken.targets)))
        losses, keys = [loss for loss, _, _ in parts], [key for _, keys, _ in parts for key in keys]
        broken = [name for _, _, names in parts for name in names]
        advice = "Lower optim.learning_rate or check the data"
        if broken:
            advice = f"{broken[0]} features are not finite: its weights are damaged or overflow at this precision"
        folder = Path(self.config.output)
        saved = run_folder.whole_checkpoints(folder)
        record = folder / f"nonfinite_step_{step:06d}.json"
        named = f"its batch begins with {keys[0]}" if self.dry else f"the batch's keys: {record}"
        if not self.dry and self.accelerator.is_main_process:
            files.write_json(record, {"step": step, "loss": losses, "grad_norm": norm, "keys": keys})
        raise FloatingPointError(
            f"step {step}: the loss is {loss}, the gradient norm {norm}; stopped before the weights "
            f"were touched (last good checkpoint: {saved[-1] if saved else 'none'}; {named}). {advice}"
        )


class Verdict:
    """Whether a step failed, asked for without waiting for the device."""

    def __init__(self, failed: Tensor) -> None:
        on_gpu = failed.is_cuda
        self.answer = torch.empty((), dtype=torch.bool, pin_memory=on_gpu).copy_(failed, non_blocking=True)
        self.event = torch.cuda.current_stream().record_event() if on_gpu else None

    def failed(self) -> bool:
        """Waits until the answer is here."""
        if self.event is not None:
            self.event.synchronize()
        return bool(self.answer)


class Taken(NamedTuple):
    """A step whose verdict is not read yet."""

    step: int
    verdict: Verdict
    loss: Tensor
    norm: Tensor
    targets: Targets
    keys: tuple[str, ...]


def require_all_trained(distiller: Distiller) -> None:
    """Raises: ValueError naming a parameter that the loss does not reach: DDP would fail on it at the next step."""
    idle = [name for name, tensor in distiller.named_parameters() if tensor.requires_grad and tensor.grad is None]
    if idle:
        raise ValueError(
            f"the loss does not reach {idle[0]} and {len(idle) - 1} other parameters; choose a plain CLIP student"
        )


def find_nonfinite(targets: Targets) -> list[str]:
    """Names of the frozen models' features that hold NaN or infinity, by option."""
    named = {f"teacher.models[{n}]'s": features for n, features in enumerate(targets.teachers)}
    if targets.momentum is not None:
        named["the moving average's"] = targets.momentum
    sides = [(f"{name} {side}", getattr(model, side)) for name, model in named.items() for side in ("image", "text")]
    return [name for name, features in sides if not features.isfinite().all()]
