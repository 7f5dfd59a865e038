"""Every option of `clipkd train`, typed. A YAML file holds differences from these defaults only."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from clipkd import files
from clipkd.config.data import DataConfig
from clipkd.config.objective import ObjectiveConfig, require_number_of_teachers, require_objective
from clipkd.errors import require, require_least

Tower = Literal["image", "text"]

MANIFEST = "manifest.json"
"""Of a cache."""


def split_weights(model: str) -> tuple[str, str | None]:
    """NAME@WEIGHTS → name, weights; None without weights. An @ in the path of an existing file or folder belongs to the path."""
    ends = [place for place, letter in enumerate(model) if letter == "@"]
    if not ends or Path(model).exists() or model.startswith(("local-dir:", "hf-hub:", "hf:", "onnx")):
        return model, None
    end = next((place for place in ends if Path(model[:place]).is_file()), ends[0])
    return model[:end], model[end + 1 :]


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    model: str = "ViT-T-16"
    """Architecture, then @ and its initial weights (an open_clip tag or a file): an open_clip name, one of clipkd's (ViT-T-16, tiny-student, tiny-teacher) or an open_clip JSON file. Or a run or open_clip folder, to continue from. Without weights it starts from random ones."""
    image: Literal["trained", "frozen", "head"] = "trained"
    """Image tower: trained; frozen at its initial weights; head: its projection alone is trained (LiT)."""
    text: Literal["trained", "frozen", "head", "teacher"] = "trained"
    """Text tower: as image; teacher: the first teacher's own, frozen (same text_cfg, width and tokenizer)."""
    image_weights: str | None = None
    """Initial weights of the image tower alone: a file of them (timm's, torchvision's, open_clip's), a timm name, a run or model as in teacher.models, or teacher for the first teacher's."""
    text_weights: str | None = None
    """Initial weights of the text tower alone: a file of them, a transformers folder or name, a run or model as in teacher.models, or teacher for the first teacher's."""

    def weights(self) -> dict[Tower, str]:
        """The source of each tower that has initial weights of its own."""
        found: dict[Tower, str | None] = {"image": self.image_weights, "text": self.text_weights}
        if self.text == "teacher":
            found["text"] = "teacher"
        return {tower: source for tower, source in found.items() if source}

    def frozen(self) -> dict[Tower, Literal["frozen", "head"]]:
        """The towers that do not train, or of which the projection alone does."""
        text = "frozen" if self.text == "teacher" else self.text
        modes: dict[Tower, Literal["trained", "frozen", "head"]] = {"image": self.image, "text": text}
        return {tower: mode for tower, mode in modes.items() if mode != "trained"}

    def check(self) -> None:
        """Raises: ValueError if something is frozen at random weights."""
        named = self.weights() if split_weights(self.model)[1] is None and not Path(self.model).is_dir() else None
        for tower in self.frozen():
            require(
                named is None or tower in named,
                f"student.{tower} is {getattr(self, tower)} at random weights: name them (student.{tower}_weights, or "
                "student.model NAME@WEIGHTS)",
            )
        require(
            self.text != "teacher" or self.text_weights in (None, "teacher"),
            f"student.text is teacher, but student.text_weights is {self.text_weights}; leave one of them out",
        )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    models: tuple[str, ...] | str = ()
    """Frozen models to learn from: NAME@WEIGHTS of open_clip (a tag or a file), local-dir:FOLDER, hf-hub:REPO, a transformers CLIPModel or SiglipModel folder, or a clipkd run. Empty trains alone; several are averaged (kl with keys: student)."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type in which the teachers' weights are held: bf16 and fp16 halve their memory. Logit scales stay fp32."""
    cache: str | None = None
    """Folder of `clipkd cache`, from which features of the teachers and of the student's frozen towers are read. No teacher is loaded; models may be left out, or must name those of the cache."""

    @property
    def given(self) -> bool:
        """Whether there is a teacher: a cache may hold what the student's frozen towers give alone."""
        if self.names or self.cache is None:
            return bool(self.names)
        try:
            return bool(json.loads((Path(self.cache) / MANIFEST).read_text(encoding="utf-8"))["teachers"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return True  # whoever opens it says what is wrong

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.models,) if isinstance(self.models, str) else self.models))


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW; cosine to 0 after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices; vectors, biases and scales have none."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay of the first and of the second moment."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    logit_scale_lr: float = 1.0
    """Learning rate of the logit scale, as a multiple of learning_rate."""
    fresh_lr: float = 1.0
    """Learning rate of what has no initial weights, as a multiple of learning_rate, where the rest has some."""
    layer_decay: float = 1.0
    """Learning rate of each block of initial weights, as a multiple of that of the block above it; 1 treats all alike."""
    ema_momentum: float = 0.0
    """Momentum of an exponential moving average of the student, evaluated and exported beside it; 0 keeps none."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, f"optim.learning_rate is {self.learning_rate}; it must be positive")
        require(
            all(0 <= beta < 1 for beta in self.betas), f"optim.betas is {list(self.betas)}; both must lie in [0, 1)"
        )
        require(0 <= self.ema_momentum < 1, f"optim.ema_momentum is {self.ema_momentum}; it must lie in [0, 1)")
        require(self.fresh_lr > 0, f"optim.fresh_lr is {self.fresh_lr}; it must be positive")
        require(0 < self.layer_decay <= 1, f"optim.layer_decay is {self.layer_decay}; it must lie in (0, 1]")
        require_least(self, "optim.", weight_decay=0, warmup_steps=0, logit_scale_lr=0, clip_norm=0)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 3
    """How many of the newest checkpoints stay on disk."""

    def __post_init__(self) -> None:
        require_least(self, "checkpoint.", every_steps=1, keep=1)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    data: tuple[str, ...] | str = ()
    """Data folders to evaluate on during training; empty evaluates nothing."""
    task: tuple[str, ...] | str = ()
    """Task for those folders by name (imagenet1k) or a task YAML, or several for one folder that holds all their data; none reads CLIP_benchmark's layout."""
    every_steps: int = 0
    """Steps between evaluations; 0 evaluates after the last step only."""
    best: str | None = None
    """TASK or TASK:METRIC by which the best checkpoint stays in RUN/best, such as imagenet1k:acc1; that of the moving average where there is one."""

    def __post_init__(self) -> None:
        require(
            self.best is None or (bool(self.data) and self.every_steps > 0),
            f"evaluation.best is {self.best!r}; it needs evaluation.data and evaluation.every_steps",
        )
        require_least(self, "evaluation.", every_steps=0)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every_steps: int = 10
    """Steps between lines of metrics.jsonl; the first and last step are always logged."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Further trackers, through Accelerate; each needs its extra installed."""

    def __post_init__(self) -> None:
        require_least(self, "log.", every_steps=1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    trains: ClassVar[bool] = True
    """Whether the loss terms are used, so that they must fit teachers and data."""
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
    """Autocast of the towers; auto is what accelerate launch --mixed_precision says, else bf16 where the GPU has it, else fp32. Logits and losses are always float32."""
    threads: int | None = None
    """CPU threads of torch per process; null leaves torch's choice."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """The model to train."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The frozen models to learn from."""
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

    @property
    def images_alone(self) -> bool:
        """Whether the data have no captions."""
        return self.data.caption_key is None

    def __post_init__(self) -> None:
        require_least(self, steps=1, threads=1, seed=0)
        require(self.batch_size >= 2, f"batch_size is {self.batch_size}; a contrastive batch needs at least 2 pairs")
        require(
            1 <= self.micro_batches <= self.batch_size,
            f"micro_batches is {self.micro_batches}; it must be 1 or more, and no more than batch_size, {self.batch_size}",
        )
        self.student.check()
        require_finite(self)
        names, has_teacher = self.teacher.names, self.teacher.given
        for tower, source in self.student.weights().items():
            option = f"student.{tower}" + "_weights" * (getattr(self.student, tower) != "teacher")
            require(has_teacher or source != "teacher", f"{option} is teacher, but teacher.models names none")
        if self.trains:
            require_objective(
                self.objective,
                has_teacher=has_teacher,
                ema_momentum=self.optim.ema_momentum,
                label_key=self.data.label_key,
                has_captions=not self.images_alone,
            )
        require(
            not self.images_alone or self.student.frozen().get("text") == "frozen",
            "data.caption_key is null, so no text tower can learn: set student.text to teacher (or to frozen, with weights)",
        )
        if names:  # otherwise the cache says how many there are
            require_number_of_teachers(self.objective, len(names))


def require_finite(options: Any, prefix: str = "") -> None:
    """Raises: ValueError naming the first number that is infinite or NaN, which no comparison with a bound would find."""
    for item in dataclasses.fields(options):
        value, name = getattr(options, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            require_finite(value, f"{name}.")
        for number in value if isinstance(value, tuple) else (value,):
            require(not isinstance(number, float) or math.isfinite(number), f"{name} is {number}; it must be finite")


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain lists and numbers, as saved with every run and checkpoint."""
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
    files.write_text(path, to_yaml(config))


def to_yaml(config: TrainConfig) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
