"""Every option of `clipkd train`, typed. A YAML file holds differences from these defaults only."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from clipkd.config.data import DataConfig
from clipkd.config.objective import ObjectiveConfig, require_number_of_teachers
from clipkd.errors import require


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    model: str = "ViT-T-16"
    """Architecture: an open_clip config name, one of clipkd's (ViT-T-16, demo-student, demo-teacher) or a path to an open_clip JSON."""
    pretrained: str | None = None
    """Initial weights: an open_clip tag or a weight file; null starts from random weights."""
    text: Literal["trained", "frozen", "teacher"] = "trained"
    """Text tower: trained; frozen as it starts (from student.pretrained); or teacher: the first teacher's own, frozen (same text_cfg, width and tokenizer)."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    model: str | None = None
    """An open_clip name, local-dir:FOLDER, hf-hub:REPO, a transformers CLIPModel or SiglipModel folder, or a clipkd run; null trains alone."""
    pretrained: str | None = None
    """Weights of an open_clip name: a tag or a file. The other kinds of teacher carry their own."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the teacher's weights are held in: bf16 or fp16 halve its memory. Its logit scale stays fp32."""
    cache: str | None = None
    """Folder of `clipkd cache`: the features of all teachers are read from it and none is loaded; model and ensemble may stay, and must then be those it was made with."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW; cosine to 0 after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices; vectors, biases and scales have none."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.98
    """AdamW's decay of the second moment."""
    eps: float = 1e-6
    """AdamW's epsilon."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    logit_scale_lr: float = 1.0
    """Learning rate of the logit scale, as a multiple of learning_rate."""
    ema_momentum: float = 0.0
    """Momentum of an exponential moving average of the student, evaluated and exported beside it; 0 keeps none."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, f"optim.learning_rate is {self.learning_rate}; it must be positive")
        require(self.weight_decay >= 0, f"optim.weight_decay is {self.weight_decay}; it must be 0 or more")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name} is {value}; it must lie in [0, 1)")
        require(self.eps > 0, f"optim.eps is {self.eps}; it must be positive")
        require(0 <= self.ema_momentum < 1, f"optim.ema_momentum is {self.ema_momentum}; it must lie in [0, 1)")
        require(self.warmup_steps >= 0, f"optim.warmup_steps is {self.warmup_steps}; it must be 0 or more")
        require(self.logit_scale_lr >= 0, f"optim.logit_scale_lr is {self.logit_scale_lr}; it must be 0 or more")
        require(self.clip_norm >= 0, f"optim.clip_norm is {self.clip_norm}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    every_minutes: float = 0.0
    """Minutes between checkpoints, beside those by steps; 0 saves by steps only."""
    keep: int = 3
    """How many of the newest checkpoints stay on disk."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 1, f"checkpoint.every_steps is {self.every_steps}; it must be 1 or more")
        require(self.every_minutes >= 0, f"checkpoint.every_minutes is {self.every_minutes}; it must be 0 or more")
        require(self.keep >= 1, f"checkpoint.keep is {self.keep}; it must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    data: tuple[str, ...] | str = ()
    """Data folders to evaluate on during training; empty evaluates nothing."""
    task: tuple[str, ...] | str = ()
    """Task YAML for those folders (see eval/), or several for one folder that holds all their data; none reads CLIP_benchmark's layout."""
    every_steps: int = 0
    """Steps between evaluations; 0 evaluates after the last step only."""
    batch_size: int = 256
    """Images per forward pass and process."""
    best: str | None = None
    """TASK or TASK:METRIC by which the best checkpoint stays in RUN/best, such as imagenet1k:acc1; that of the moving average where there is one."""

    def __post_init__(self) -> None:
        require(
            self.best is None or (bool(self.data) and self.every_steps > 0),
            f"evaluation.best is {self.best!r}; it needs evaluation.data and evaluation.every_steps",
        )
        require(self.every_steps >= 0, f"evaluation.every_steps is {self.every_steps}; it must be 0 or more")
        require(self.batch_size >= 1, f"evaluation.batch_size is {self.batch_size}; it must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every_steps: int = 10
    """Steps between lines of metrics.jsonl; the first and last step are always logged."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Further trackers, through Accelerate; each needs its extra installed."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 1, f"log.every_steps is {self.every_steps}; it must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    output: str = "runs/train"
    """Run folder, made by this command: config.yaml, metrics.jsonl, results.jsonl, checkpoints/."""
    steps: int = 10_000
    """Optimizer steps."""
    batch_size: int = 256
    """Image-text pairs per step over all processes."""
    micro_batches: int = 1
    """Parts in which a process's share of a batch passes the towers (GradCache): less memory for one more forward pass; negatives and gradient stay those of the whole batch (a BatchNorm sees parts)."""
    seed: int = 0
    """Seed of weights, order of data and augmentation."""
    resume: str | None = None
    """latest continues the run in `output` from its newest checkpoint; a checkpoint folder continues from that one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast of the towers; auto is bf16 where the GPU has it, else fp32. Logits and losses are always float32."""
    threads: int | None = None
    """CPU threads of torch per process; null leaves torch's choice."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """The model to train."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The frozen model to learn from."""
    ensemble: tuple[TeacherConfig, ...] = ()
    """Further teachers: kl and soft_ce then learn from the mean of all softmaxes (MobileCLIP)."""
    data: DataConfig = field(default_factory=DataConfig)
    """Image-text pairs."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Loss terms, each with its weight."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Zero-shot evaluation during training."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is written while training."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps is {self.steps}; it must be 1 or more")
        require(self.batch_size >= 2, f"batch_size is {self.batch_size}; a contrastive batch needs at least 2 pairs")
        require(
            1 <= self.micro_batches <= self.batch_size,
            f"micro_batches is {self.micro_batches}; it must be 1 or more, and no more than batch_size, {self.batch_size}",
        )
        require(self.threads is None or self.threads >= 1, f"threads is {self.threads}; it must be 1 or more")
        require(self.seed >= 0, f"seed is {self.seed}; it must be 0 or more")
        at_random = self.student.text == "frozen" and not self.student.pretrained
        require(not at_random, "student.text is frozen at random weights: set student.pretrained, or leave it trained")
        require_finite(self)
        require_objective(self)


def require_finite(options: Any, prefix: str = "") -> None:
    """Raises: ValueError naming the first number that is infinite or NaN, which no comparison with a bound would find."""
    for item in dataclasses.fields(options):
        value, name = getattr(options, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            require_finite(value, f"{name}.")
        for number in value if isinstance(value, tuple) else (value,):
            require(not isinstance(number, float) or math.isfinite(number), f"{name} is {number}; it must be finite")


def require_objective(config: TrainConfig) -> None:
    """Raises: ValueError if the terms that are on ask for something that the run does not have."""
    active = config.objective.active()
    require(bool(active), "no loss term is on: set objective.info_nce.weight, or a teacher and one of its terms")
    distillation = [name for name, term in active.items() if term.needs_teacher]
    first = f"objective.{distillation[0]}" if distillation else ""
    if config.teacher.model is None:
        require(not config.ensemble, "ensemble names further teachers, but there is no first: set teacher.model")
        require(config.student.text != "teacher", "student.text is teacher, but there is none: set teacher.model")
    if config.teacher.model is None and config.teacher.cache is None:
        require(not distillation, f"{first} needs a teacher: set teacher.model, or teacher.cache")
    else:
        require(
            bool(distillation),
            "a teacher is set but no term uses it: set objective.gkl.weight or that of another distillation term, "
            "or leave teacher.model and teacher.cache out",
        )
    named = config.teacher.model is not None or config.teacher.pretrained is None
    require(
        named, f"teacher.pretrained is {config.teacher.pretrained}, but teacher.model names no architecture; name both"
    )
    for number, teacher in enumerate(config.ensemble):
        require(teacher.model is not None, f"ensemble[{number}] names no model")
        require(teacher.cache is None, f"ensemble[{number}].cache is set; teacher.cache holds all teachers")
    if config.teacher.cache is None or config.teacher.model is not None:  # else the cache knows how many there are
        require_number_of_teachers(config.objective, 1 + len(config.ensemble))
    momentum = [name for name, term in active.items() if term.needs_momentum]
    require(
        not momentum or config.optim.ema_momentum > 0,
        f"objective.{momentum[0] if momentum else ''} uses momentum features, but optim.ema_momentum is 0; set it, e.g. 0.995",
    )
    capacity = config.objective.queue.capacity
    require(
        capacity == 0 or capacity >= config.batch_size,
        f"objective.queue.capacity is {capacity}, less than one global batch of {config.batch_size} pairs; raise it",
    )
    closed_set = config.objective.closed_set
    require(
        not (closed_set.weight and closed_set.class_prior) or config.data.label_key is not None,
        "objective.closed_set.class_prior needs labels: set data.label_key, or class_prior to false",
    )
    require(
        config.data.label_key is None or closed_set.weight > 0,
        f"data.label_key is {config.data.label_key}, but objective.closed_set, which uses labels, has no weight",
    )


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The whole configuration as plain lists and numbers, as saved with every run and checkpoint."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))  # lists for tuples
    assert isinstance(plain, dict)
    return plain


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{a: {b: 1}} → {a.b: 1}"""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def save(config: TrainConfig, path: Path) -> None:
    path.write_text(to_yaml(config), encoding="utf-8")


def to_yaml(config: TrainConfig) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
