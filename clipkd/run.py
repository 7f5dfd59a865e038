"""One training run: built and checked as a whole, then logged, evaluated and saved."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from clipkd import checkpoint, data, distributed, metrics_log, models, momentum, optim, progress
from clipkd import config as configuration
from clipkd.closed_set import closed_set_fingerprint, open_closed_set
from clipkd.config import TrainConfig
from clipkd.distill import Distiller, require_fitting_teachers
from clipkd.evaluate import Task, evaluate, load_task, open_task
from clipkd.models import Encoder
from clipkd.progress import Stopwatch
from clipkd.resume import find_checkpoint, flatten, require_same_run
from clipkd.views import Batch


@dataclass
class Run:
    """All that a step touches. `model` is `distiller` as Accelerate wrapped it."""

    config: TrainConfig
    folder: Path
    accelerator: Accelerator
    distiller: Distiller
    model: nn.Module
    teachers: list[Encoder]
    ema: Encoder | None
    optimizer: Any
    order: data.BatchOrder
    batches: Iterator[Batch]
    tasks: list[tuple[Task, str]]
    identity: dict[str, Any]
    """What a resumed run must share beyond its configuration: student, teacher, pairs, precision."""
    seconds: float
    """Training time of the steps before this start, evaluation and checkpoints left out."""


def open_run(config: TrainConfig) -> Run:
    """Build and check everything; write the run folder only when nothing can fail any more.

    Raises: ValueError or FileNotFoundError that name the option to change.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    require_trackers(config)
    accelerator = make_accelerator(config)
    torch.manual_seed(config.seed)
    student = models.create_student(
        config.student, logit_bias=config.objective.logit_scale.bias_init if config.objective.needs_bias else None
    ).train()
    teachers = [
        models.load(teacher.model, pretrained=teacher.pretrained).requires_grad_(False)
        for teacher in (config.teacher, *config.ensemble)
        if teacher.model is not None
    ]
    require_fitting_teachers(config.objective, teachers)
    source = data.open_source(config.data)
    tasks = [(load_task(config.evaluation.task), root) for root in config.evaluation.data]
    for task, root in tasks:
        open_task(task, root, student.preprocess)
    identity = {
        "student": {
            "name": student.name,
            "model_cfg": student.model_config,
            "preprocess_cfg": student.preprocess_config,
        },
        "teacher_sha256": teachers[0].weights_sha256() if teachers else None,
        **({"further_teachers_sha256": [teacher.weights_sha256() for teacher in teachers[1:]]} if teachers[1:] else {}),
        **(
            {"classes": closed_set_fingerprint(config.objective.closed_set)}
            if config.objective.closed_set.weight
            else {}
        ),
        "pairs": f"{len(source)} {source.fingerprint()}",
        "mixed_precision": accelerator.mixed_precision,
    }
    resumed = find_checkpoint(config)
    state = {"step": 0, "seconds": 0.0} if resumed is None else checkpoint.read_state(resumed)
    if len(set(distributed.gather_objects(str(resumed)))) > 1:
        raise ValueError(
            f"the processes found different checkpoints in {config.output}, this one {resumed}; share the folder"
        )
    if resumed is not None:
        require_same_run(resumed, state, config, identity)
    order = data.BatchOrder(
        len(source),
        batch_size=config.batch_size,
        seed=config.seed,
        start=state["step"],
        stop=config.steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    distiller = make_distiller(config, student, teachers, accelerator.device)
    ema = momentum.copy_for_average(distiller.student) if config.optim.ema_momentum else None
    optimizer = make_optimizer(distiller, config)
    if resumed is not None:
        checkpoint.restore(resumed, model=distiller, ema=ema, optimizer=optimizer)
        distiller.load_memory(checkpoint.read_memory(resumed))
    model, prepared_optimizer = accelerator.prepare(distiller, optimizer)
    if resumed is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    batches = data.training_batches(
        source,
        config.data,
        student=student.spec,
        teachers=[teacher.spec for teacher in teachers],
        order=order,
        pin_memory=accelerator.device.type == "cuda",
    )
    folder = Path(config.output)
    if accelerator.is_main_process:
        where = (
            f"from step 0 of {config.steps}"
            if resumed is None
            else f"resumed from {resumed.name} of {config.steps} steps"
        )
        left_out = (
            f"; {source.num_incomplete} samples without image or caption are left out" if source.num_incomplete else ""
        )
        progress.console.print(f"{folder}: {where}, {len(source)} pairs{left_out}")
        folder.mkdir(parents=True, exist_ok=True)
        configuration.save(config, folder / "config.yaml")
        for name in ("metrics.jsonl", "results.jsonl"):
            metrics_log.drop_after(folder / name, state["step"])
    if config.log.trackers:
        accelerator.init_trackers("clipkd", config=flatten(configuration.to_dict(config)))
    return Run(
        config=config,
        folder=folder,
        accelerator=accelerator,
        distiller=distiller,
        model=model,
        teachers=teachers,
        ema=ema,
        optimizer=prepared_optimizer,
        order=order,
        batches=batches,
        tasks=tasks,
        identity=identity,
        seconds=state["seconds"],
    )


def make_distiller(config: TrainConfig, student: Encoder, teachers: list[Encoder], device: torch.device) -> Distiller:
    """Student, teachers and all that the objective needs, on the device."""
    for teacher in teachers:
        teacher.to(device)
    term = config.objective.closed_set
    closed_set = open_closed_set(term, student=student, teacher=teachers[0], device=device) if term.weight else None
    dim = teachers[0].dim if teachers else None
    return Distiller(student, config.objective, teacher_dim=dim, closed_set=closed_set, device=device).to(device)


def make_optimizer(distiller: Distiller, config: TrainConfig) -> torch.optim.Optimizer:
    options = config.optim
    groups = optim.parameter_groups(
        distiller.named_parameters(), weight_decay=options.weight_decay, logit_scale_lr=options.logit_scale_lr
    )
    betas = (options.beta1, options.beta2)
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=betas, eps=options.eps, fused=True)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Raises: ValueError if Accelerate's own settings would change what the configuration says."""
    accelerator = Accelerator(
        mixed_precision=resolve_precision(config.precision, distributed.join_processes().device),
        log_with=list(config.log.trackers) or None,
        project_dir=config.output,
    )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            "Accelerate is set to accumulate gradients, clipkd takes whole batches; unset it (accelerate config)"
        )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ValueError(
            f"clipkd trains with DDP, Accelerate is set to {accelerator.distributed_type}; see accelerate config"
        )
    return accelerator


def resolve_precision(precision: str, device: torch.device | None) -> str:
    """Accelerate's name for the configured precision on this process's device."""
    on_gpu = device is not None and device.type == "cuda"
    if precision == "auto":
        return "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if precision == "fp16" and not on_gpu:
        raise ValueError("precision is fp16, which needs a GPU; use fp32 or bf16")
    return "no" if precision == "fp32" else precision


def require_trackers(config: TrainConfig) -> None:
    for tracker in config.log.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ValueError(f"log.trackers names {tracker}, which is not installed: pip install 'clipkd[{tracker}]'")


def log(run: Run, step: int, metrics: dict[str, Tensor], watch: Stopwatch) -> str:
    """Mean over processes → metrics.jsonl and the trackers; returns a note for the progress bar."""
    values = distributed.mean(
        torch.stack([value.detach().float().to(run.accelerator.device) for value in metrics.values()])
    )
    row = {"step": step, "epoch": step / run.order.steps_per_epoch, "world_size": distributed.world_size()}
    row |= dict(zip(metrics, values.tolist(), strict=True)) | watch.take_window()
    if run.accelerator.is_main_process:
        metrics_log.append(run.folder / "metrics.jsonl", row)
    if run.config.log.trackers:
        run.accelerator.log(row, step=step)
    shown = {"loss": row["loss"], "images/s": row["images_per_second"]}
    return " ".join(f"{name} {value:.4g}" for name, value in shown.items())


def is_evaluated(run: Run, step: int) -> bool:
    """Whether results.jsonl has this step's rows; the main process decides for all."""
    rows = [row for row in metrics_log.read(run.folder / "results.jsonl") if row["step"] == step]
    expected = len(run.tasks) * (1 if run.ema is None else 2)
    return distributed.gather_objects(len(rows) >= expected)[0]


def evaluate_tasks(run: Run, step: int) -> None:
    """Every configured task on the student and, where there is one, on its moving average → results.jsonl."""
    candidates = {"student": run.distiller.student} | ({} if run.ema is None else {"ema": run.ema})
    for task, root in run.tasks:
        for weights, encoder in candidates.items():
            training = encoder.training
            row = evaluate(
                encoder.eval(),
                task,
                root,
                device=run.accelerator.device,
                batch_size=run.config.evaluation.batch_size,
                num_workers=run.config.data.num_workers,
            )
            encoder.train(training)
            if run.accelerator.is_main_process:
                row |= {"model": str(run.folder), "weights": weights, "step": step}
                metrics_log.append(run.folder / "results.jsonl", row)


def save(run: Run, step: int, seconds: float) -> None:
    """A whole checkpoint, then room for it: older ones are deleted last."""
    if run.accelerator.is_main_process:
        scaler = run.accelerator.scaler
        state = {
            "seconds": seconds,
            "config": configuration.to_dict(run.config),
            "identity": run.identity,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        checkpoint.save(
            run.folder,
            step,
            model=run.distiller,
            ema=run.ema,
            optimizer=run.optimizer,
            memory=run.distiller.memory(),
            state=state,
        )
        checkpoint.prune(run.folder, run.config.checkpoint.keep)
    distributed.barrier()
