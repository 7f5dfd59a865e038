"""The training loop: Accelerate for devices and processes, everything else in plain sight."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipkd import checkpoint, distributed, momentum, optim, progress
from clipkd.config import TrainConfig
from clipkd.run import Run, evaluate_tasks, is_evaluated, log, open_run, save
from clipkd.views import Batch

MAX_LOG_SCALE = math.log(100)  # CLIP's bound


def train(config: TrainConfig) -> Path:
    """Train as configured, on every process that was launched; returns the run folder.

    Raises: ValueError or FileNotFoundError before anything is written if the configuration cannot work (only a student
        with parts that the loss does not reach shows at the first step);
        FloatingPointError if the loss or gradient stops being finite, before it reaches the weights.
    """
    run = open_run(config)
    watch = progress.Stopwatch(run.seconds)
    start = run.order.start
    with progress.Bar(run.folder.name, config.steps, done=start, visible=run.accelerator.is_main_process) as bar:
        for step in range(start, config.steps):
            with watch.waiting():
                batch = next(run.batches)
            metrics = training_step(run, batch, step)
            watch.count(config.batch_size)
            done, last = step + 1, step + 1 == config.steps
            if done == 1 or last or done % config.log.every_steps == 0:
                bar.note = log(run, done, metrics, watch)
            if last or done % config.checkpoint.every_steps == 0:
                with watch.paused():
                    save(run, done, watch.seconds)
            if not last and config.evaluation.every_steps and done % config.evaluation.every_steps == 0:
                with watch.paused():
                    evaluate_tasks(run, done)
            bar.advance()
    if not is_evaluated(run, config.steps):
        evaluate_tasks(run, config.steps)
    run.accelerator.end_training()
    return run.folder


def training_step(run: Run, batch: Batch, step: int) -> dict[str, Tensor]:
    """One optimizer step on this process's share of the global batch."""
    optimizer, accelerator, options = run.optimizer, run.accelerator, run.config.optim
    rate = optim.learning_rate(
        step, peak=options.learning_rate, warmup_steps=options.warmup_steps, steps=run.config.steps
    )
    optim.set_learning_rate(optimizer, rate)
    # Dropout as a function of seed, step and process: a resumed run needs no random state.
    torch.manual_seed(int(np.random.SeedSequence((run.config.seed, step, distributed.rank())).generate_state(1)[0]))

    teacher_features = None
    if run.teacher is not None:
        assert batch.teacher is not None
        with torch.no_grad(), accelerator.autocast():
            teacher_features = run.teacher.features(batch.teacher.to(accelerator.device))
    loss, metrics = run.model(batch.student.to(accelerator.device), teacher_features)
    accelerator.backward(loss)
    if step == run.order.start:
        require_all_trained(run)
    norm = accelerator.clip_grad_norm_(run.distiller.parameters(), options.clip_norm or math.inf)
    assert norm is not None
    require_finite(run, step, loss, norm)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        run.distiller.student.model.logit_scale.clamp_(0, MAX_LOG_SCALE)  # type: ignore[union-attr, operator]
    if run.ema is not None:
        momentum.update_average(run.ema, run.distiller.student, options.ema_momentum)
    return {**metrics, "grad_norm": norm, "lr": torch.tensor(rate)}


def require_all_trained(run: Run) -> None:
    """Raises: ValueError naming a parameter that the loss does not reach: DDP would fail on it at the next step."""
    idle = [name for name, tensor in run.distiller.named_parameters() if tensor.requires_grad and tensor.grad is None]
    if idle:
        raise ValueError(
            f"the loss does not reach {idle[0]} and {len(idle) - 1} other parameters; choose a plain CLIP student"
        )


def require_finite(run: Run, step: int, loss: Tensor, norm: Tensor) -> None:
    # After DDP's reduction one process's NaN is in every gradient norm, so all processes stop together. Under fp16 an
    # infinite norm is how the loss scaler finds its scale; there the averaged loss is looked at instead.
    scaler = run.accelerator.scaler
    value = norm if scaler is None else distributed.mean(loss)
    if not torch.isfinite(value) or (scaler is not None and scaler.get_scale() < 1):
        saved = checkpoint.whole_checkpoints(run.folder)
        raise FloatingPointError(
            f"step {step + 1}: the loss is {loss.item()}, the gradient norm {norm.item()}; stopped before the weights were "
            f"touched. Last good checkpoint: {saved[-1] if saved else 'none'}. Lower optim.learning_rate or check the data"
        )
