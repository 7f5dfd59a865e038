"""One training run: built and checked as a whole, then logged, evaluated and saved."""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from clipkd import checkpoint, data, distributed, metrics_log, models, momentum, optim, progress
from clipkd import config as configuration
from clipkd.config import TrainConfig
from clipkd.distill import Distiller
from clipkd.evaluate import Task, evaluate, load_task, open_task
from clipkd.models import Encoder
from clipkd.progress import Stopwatch
from clipkd.views import Batch

RESUME_MAY_DIFFER = (
    *("output", "resume", "threads", "checkpoint.", "evaluation.", "log.", "data.num_workers"),
    # Compared by what they hold, not by where it lies.
    *("data.path", "teacher.model", "teacher.pretrained"),
)


@dataclass
class Run:
    """All that a step touches. `model` is `distiller` as Accelerate wrapped it."""

    config: TrainConfig
    folder: Path
    accelerator: Accelerator
    distiller: Distiller
    model: nn.Module
    teacher: Encoder | None
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
    student = models.create_student(config.student).train()
    teacher = None
    if config.teacher.model is not None:
        teacher = models.load(config.teacher.model, pretrained=config.teacher.pretrained).requires_grad_(False)
    distiller = Distiller(student, config.objective, teacher_dim=None if teacher is None else teacher.dim)
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
        "teacher_sha256": None if teacher is None else teacher.weights_sha256(),
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
    distiller.to(accelerator.device)
    ema = momentum.copy_for_average(distiller.student) if config.optim.ema_momentum else None
    optimizer = make_optimizer(distiller, config)
    if resumed is not None:
        checkpoint.restore(resumed, model=distiller, ema=ema, optimizer=optimizer)
    model, prepared_optimizer = accelerator.prepare(distiller, optimizer)
    if resumed is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    batches = data.training_batches(
        source,
        config.data,
        student=student.spec,
        teacher=None if teacher is None else teacher.spec,
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
        teacher=None if teacher is None else teacher.to(accelerator.device),
        ema=ema,
        optimizer=prepared_optimizer,
        order=order,
        batches=batches,
        tasks=tasks,
        identity=identity,
        seconds=state["seconds"],
    )


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


def find_checkpoint(config: TrainConfig) -> Path | None:
    """Where to start from: None is step 0.

    Raises: ValueError if the output already holds a run that this one would overwrite or mix with.
    """
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; name a folder")
    saved = checkpoint.whole_checkpoints(output)
    if config.resume == "latest":
        return saved[-1] if saved else None
    if config.resume is None:
        if saved:
            raise ValueError(
                f"{output} already holds a run, {saved[-1].name}; continue it with --resume latest or set --output"
            )
        return None
    resumed = checkpoint.resolve(Path(config.resume))
    if saved and saved[-1].resolve() != resumed.resolve():
        raise ValueError(f"{output} holds {saved[-1].name} already; to go back to {resumed}, set another --output")
    return resumed


def require_same_run(folder: Path, state: dict[str, Any], config: TrainConfig, identity: dict[str, Any]) -> None:
    """Raises: ValueError naming the first thing that would make the resumed run another run."""
    defaults = flatten(configuration.to_dict(TrainConfig()))  # for options that came after the checkpoint
    before, now = defaults | flatten(state["config"]), flatten(configuration.to_dict(config))
    before |= flatten(state["identity"])
    now |= flatten(json.loads(json.dumps(identity)))  # as it reads after a checkpoint: lists for tuples
    for key in sorted(before.keys() | now.keys()):
        if not key.startswith(RESUME_MAY_DIFFER) and before.get(key) != now.get(key):
            raise ValueError(
                f"{folder} was made with {key} = {before.get(key)}, now it is {now.get(key)}; "
                "a resumed run must keep it: change it back, or start another run"
            )


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{a: {b: 1}} → {a.b: 1}; lists become text, as trackers want it."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = str(value) if isinstance(value, list) else value
    return flat


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
        checkpoint.save(run.folder, step, model=run.distiller, ema=run.ema, optimizer=run.optimizer, state=state)
        checkpoint.prune(run.folder, run.config.checkpoint.keep)
    distributed.barrier()
