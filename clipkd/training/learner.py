"""One optimizer step: learning rate, targets, loss, gradients, finite check, update, moving average, queue."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from clipkd import distributed, files
from clipkd.config.train import TrainConfig
from clipkd.models import run_folder
from clipkd.models.encoder import Encoder
from clipkd.objective import memory
from clipkd.objective.comparison import Targets
from clipkd.objective.distiller import Distiller, Metrics
from clipkd.teachers.open import Teachers
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
    ema: Encoder | None
    teachers: Teachers
    views: Views
    start: int
    """The first step that this process takes."""
    dry: bool
    """Whether steps are only tried: then a failed step writes no record."""

    def step(self, batch: Batch, step: int) -> Metrics:
        """Take step 0, 1, … on this process's share of the global batch; the metrics stay on the device.

        Raises: FloatingPointError on every process if the loss or the gradient is not finite, before the update.
        """
        options = self.config.optim
        rate = optim.learning_rate(
            step, peak=options.learning_rate, warmup_steps=options.warmup_steps, steps=self.config.steps
        )
        optim.set_learning_rate(self.optimizer, rate)
        view, *teacher_views = self.views.of(batch, self.accelerator.device)
        view = self.teachers.student_view(batch, view)
        targets = self.targets(batch, view, teacher_views)
        del teacher_views  # as large as the student's
        loss, metrics = self.backward(view, targets, step)
        if step == self.start:
            require_all_trained(self.distiller)
        norm = self.accelerator.clip_grad_norm_(self.distiller.parameters(), options.clip_norm or math.inf)
        assert norm is not None
        self.require_finite(step, loss, norm, targets, batch)
        self.update()
        return {**metrics, "grad_norm": norm, "lr": torch.tensor(rate)}

    @torch.no_grad()
    def targets(self, batch: Batch, view: View, teacher_views: list[View]) -> Targets:
        """Features of the teachers and the moving average. Raises: ValueError for a label beyond the closed set."""
        device, closed_set = self.accelerator.device, self.distiller.closed_set
        if closed_set is not None and (largest := int(batch.labels.max())) >= len(closed_set.teacher_classes):
            raise ValueError(
                f"{batch.keys[int(batch.labels.argmax())]} has class {largest} by data.label_key, but "
                f"objective.closed_set.classes names {len(closed_set.teacher_classes)}, numbered from 0; name them all, or "
                "leave that image out"
            )
        with self.accelerator.autocast():
            teachers, momentum = self.teachers.features(batch, teacher_views), None
            if self.distiller.needs_momentum:
                assert self.ema is not None
                momentum = join([self.ema.features(part) for part in view.split(self.config.micro_batches)])
        return Targets(teachers, momentum, batch.ids.to(device), batch.labels.to(device))

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

    def require_finite(self, step: int, loss: Tensor, norm: Tensor, targets: Targets, batch: Batch) -> None:
        """Raises: FloatingPointError on every process, after writing the batch's keys to RUN/nonfinite_step_N.json."""
        # DDP averages gradients, so one process's NaN is in every process's norm and all stop together. Under fp16 the
        # loss scaler searches its scale through infinite norms; there the averaged loss is tested instead.
        scaler = self.accelerator.scaler
        value = norm if scaler is None else distributed.mean(loss)
        if torch.isfinite(value) and (scaler is None or scaler.get_scale() >= 1):
            return
        parts = distributed.gather_objects((loss.item(), batch.keys, find_nonfinite(targets)))
        losses, keys = [loss for loss, _, _ in parts], [key for _, keys, _ in parts for key in keys]
        broken = [name for _, _, names in parts for name in names]
        advice = "Lower optim.learning_rate or check the data"
        if broken:
            advice = f"{broken[0]} features are not finite: its weights are damaged or overflow at this precision"
        folder = Path(self.config.output)
        saved = run_folder.whole_checkpoints(folder)
        record = folder / f"nonfinite_step_{step + 1:06d}.json"
        named = f"its batch begins with {keys[0]}" if self.dry else f"the batch's keys: {record}"
        if not self.dry and self.accelerator.is_main_process:
            files.write_json(record, {"step": step + 1, "loss": losses, "grad_norm": norm.item(), "keys": keys})
        raise FloatingPointError(
            f"step {step + 1}: the loss is {loss.item()}, the gradient norm {norm.item()}; stopped before the weights "
            f"were touched (last good checkpoint: {saved[-1] if saved else 'none'}; {named}). {advice}"
        )

    def update(self) -> None:
        """Update the weights, then the moving average, the queue and the class prior."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.distiller.finish_step()
        if self.ema is not None:
            # DDP copies the main process's buffers at the next forward only; the averages must not differ before.
            distributed.copy_from_main(self.distiller.student.buffers())
            memory.update_average(self.ema, self.distiller.student, self.config.optim.ema_momentum)


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
