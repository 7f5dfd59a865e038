"""The training loop: Accelerate for devices and processes, everything else in plain sight."""

import math
import signal
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipkd import data, distributed, files, progress
from clipkd import errors as stops
from clipkd.config.train import TrainConfig
from clipkd.models import run_folder
from clipkd.objective import memory as momentum
from clipkd.objective.comparison import Targets
from clipkd.training import gradient_cache, optim
from clipkd.training.run import (
    Run,
    evaluate_tasks,
    evaluation_is_due,
    is_evaluated,
    log,
    open_run,
    save,
    skipped_too_much,
)
from clipkd.views import Batch, View, join


def train(config: TrainConfig) -> Path:
    """Train as configured, on every process that was launched; returns the run folder.

    Raises: ValueError or FileNotFoundError before anything is written if the configuration cannot work (later only for
        a student with parts that the loss does not reach, at the first step, and for a label beyond the classes);
        FloatingPointError if the loss or gradient stops being finite, before it reaches the weights; RunStopped if too
        much of the data is damaged or a loader process dies; Interrupted after SIGINT or SIGTERM, when the step at
        hand is saved.
    """
    run = open_run(config)
    with run.claim:
        take_steps(run)
        if not is_evaluated(run, config.steps):
            evaluate_tasks(run, config.steps)
    run.accelerator.end_training()
    return run.folder


def take_steps(run: Run) -> None:
    config, watch = run.config, progress.Stopwatch(run.seconds)
    with (
        stops.deferred_signals() as interruption,  # until the loader processes are gone
        run.feed,
        progress.Bar(run.folder.name, config.steps, done=run.start, visible=run.accelerator.is_main_process) as bar,
    ):
        if evaluation_is_due(run, run.start) and not is_evaluated(run, run.start):
            evaluate_on_the_way(run, interruption, run.start)
        for step in range(run.start, config.steps):
            with watch.waiting():
                batch = next(run.feed)
            metrics = training_step(run, batch, step)
            watch.count(config.batch_size)
            done, last = step + 1, step + 1 == config.steps
            if done == 1 or last or done % config.log.every_steps == 0:
                bar.note = log(run, done, metrics, watch)
            ending = agree(run, interruption, done)
            evaluation = evaluation_is_due(run, done)
            with watch.paused():
                if last or ending or evaluation or done % config.checkpoint.every_steps == 0:
                    save(run, done, watch.seconds)
                if ending and (not last or isinstance(ending, stops.RunStopped)):
                    raise ending
                if evaluation:
                    evaluate_on_the_way(run, interruption, done)
            bar.advance()


def evaluate_on_the_way(run: Run, interruption: stops.Interruption, done: int) -> None:
    """The step is saved: a signal need not wait, and a resumed run evaluates it again."""
    interruption.immediate = True
    try:
        evaluate_tasks(run, done)
    finally:
        interruption.immediate = False


def agree(run: Run, interruption: stops.Interruption, done: int) -> BaseException | None:
    """What ends the run after this step, the same on every process; None if it continues."""
    (number,) = distributed.maximum([interruption.number], run.accelerator.device)
    saved = f"saved {run_folder.checkpoint_folder(run.folder, done)}"
    if number:
        ending = f"{signal.Signals(number).name} after step {done}; {saved}, go on with --resume latest"
        return stops.Interrupted(number, ending)
    if damage := skipped_too_much(run, done):
        return stops.RunStopped(
            f"{damage}, more than data.max_skipped allows ({run.config.data.max_skipped:.1%}); "
            f"{run.folder / 'skipped.jsonl'} names some. Mend the data, or raise data.max_skipped and go on with "
            f"--resume latest ({saved})"
        )
    return None


def training_step(run: Run, batch: Batch, step: int) -> dict[str, Tensor]:
    """One optimizer step on this process's share of the global batch."""
    optimizer, accelerator, options = run.optimizer, run.accelerator, run.config.optim
    run.skips.add(data.Skip(*skip) for skip in batch.skipped)
    run.num_opened += batch.shards_opened
    rate = optim.learning_rate(
        step, peak=options.learning_rate, warmup_steps=options.warmup_steps, steps=run.config.steps
    )
    optim.set_learning_rate(optimizer, rate)
    student_view, *teacher_views = run.views.of(batch, accelerator.device)
    student_view = run.teachers.student_view(batch, student_view)
    targets = find_targets(run, batch, student_view, teacher_views)
    del teacher_views  # as large as the student's
    loss, metrics = backward(run, student_view, targets, step)
    if step == run.start:
        require_all_trained(run)
    norm = accelerator.clip_grad_norm_(run.distiller.parameters(), options.clip_norm or math.inf)
    assert norm is not None
    require_finite(run, step, loss, norm, targets, batch)
    optimizer.step()
    optimizer.zero_grad()
    run.distiller.finish_step()
    if run.ema is not None:
        # DDP gives every process the main one's buffers at the next forward only; the averages must not part before.
        distributed.copy_from_main(run.distiller.student.buffers())
        momentum.update_average(run.ema, run.distiller.student, options.ema_momentum)
    return {**metrics, "grad_norm": norm, "lr": torch.tensor(rate)}


def backward(run: Run, view: View, targets: Targets, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and series of this process's share of the batch; its gradients are in the parameters, averaged over processes."""
    seed, distiller, parts = run.config.seed, run.distiller, run.config.micro_batches

    def reseed(*micro_batch: int) -> None:
        """Dropout as a function of seed, step, process and micro-batch: a resumed run needs no random state."""
        sequence = np.random.SeedSequence((seed, step, distributed.rank(), *micro_batch))
        torch.manual_seed(int(sequence.generate_state(1)[0]))

    if parts > 1:
        return gradient_cache.backward(
            *(distiller, view, targets),
            step=step,
            micro_batches=parts,
            reseed=reseed,
            model=run.model,
            start_backward=run.accelerator.backward,
        )
    reseed()
    student, classes = run.model(view, distiller.prompts_at(step))
    loss, metrics = distiller.loss(student, targets, step=step, class_features=classes)
    run.accelerator.backward(loss)
    return loss, metrics


@torch.no_grad()
def find_targets(run: Run, batch: Batch, view: View, teacher_views: list[View]) -> Targets:
    """What the frozen teachers say of the batch, and the moving average of the student's view."""
    device = run.accelerator.device
    require_known_labels(run, batch)
    with run.accelerator.autocast():
        teachers = run.teachers.features(batch, teacher_views)
        momentum_features = None
        if run.distiller.needs_momentum:
            assert run.ema is not None
            momentum_features = join([run.ema.features(part) for part in view.split(run.config.micro_batches)])
    return Targets(teachers, momentum_features, batch.ids.to(device), batch.labels.to(device))


def require_known_labels(run: Run, batch: Batch) -> None:
    """Raises: ValueError if a label is none of the closed set's classes."""
    closed_set = run.distiller.closed_set
    if closed_set is not None and (largest := int(batch.labels.max())) >= len(closed_set.teacher_classes):
        key = batch.keys[int(batch.labels.argmax())]
        raise ValueError(
            f"{key} has class {largest} by data.label_key, but objective.closed_set.classes names "
            f"{len(closed_set.teacher_classes)}, numbered from 0; name them all, or leave that image out"
        )


def require_all_trained(run: Run) -> None:
    """Raises: ValueError naming a parameter that the loss does not reach: DDP would fail on it at the next step."""
    idle = [name for name, tensor in run.distiller.named_parameters() if tensor.requires_grad and tensor.grad is None]
    if idle:
        raise ValueError(
            f"the loss does not reach {idle[0]} and {len(idle) - 1} other parameters; choose a plain CLIP student"
        )


def require_finite(run: Run, step: int, loss: Tensor, norm: Tensor, targets: Targets, batch: Batch) -> None:
    """Raises: FloatingPointError on every process; the batch's keys are in RUN/nonfinite_step_N.json by then."""
    # After DDP's reduction one process's NaN is in every gradient norm, so all processes stop together. Under fp16 an
    # infinite norm is how the loss scaler finds its scale; there the averaged loss is looked at instead.
    scaler = run.accelerator.scaler
    value = norm if scaler is None else distributed.mean(loss)
    if not torch.isfinite(value) or (scaler is not None and scaler.get_scale() < 1):
        broken = [part for parts in distributed.gather_objects(find_nonfinite(targets)) for part in parts]
        advice = "Lower optim.learning_rate or check the data"
        if broken:
            advice = f"{broken[0]} features are not finite: its weights are damaged or overflow at this precision"
        saved = run_folder.whole_checkpoints(run.folder)
        record = run.folder / f"nonfinite_step_{step + 1:06d}.json"
        keys = [key for part in distributed.gather_objects(batch.keys) for key in part]
        losses = distributed.gather_objects(loss.item())
        named = f"the batch's keys: {record}"
        if run.dry:
            named = f"its batch begins with {keys[0]}"
        elif run.accelerator.is_main_process:
            files.write_json(record, {"step": step + 1, "loss": losses, "grad_norm": norm.item(), "keys": keys})
        raise FloatingPointError(
            f"step {step + 1}: the loss is {loss.item()}, the gradient norm {norm.item()}; stopped before the weights were "
            f"touched. Last good checkpoint: {saved[-1] if saved else 'none'}; {named}. {advice}"
        )


def find_nonfinite(targets: Targets) -> list[str]:
    """Which frozen model's features hold NaN or infinity, named by its option."""
    named = {f"teacher.models[{n}]'s": f for n, f in enumerate(targets.teachers)}
    if targets.momentum is not None:
        named["the moving average's"] = targets.momentum
    return [
        f"{name} {side}"
        for name, model in named.items()
        for side, part in (("image", model.image), ("text", model.text))
        if not part.isfinite().all()
    ]
