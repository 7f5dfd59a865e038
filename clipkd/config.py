"""Every option of `clipkd train`, typed. A YAML file holds differences from these defaults only."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

Keys = Literal["student", "teacher"]


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    model: str = "ViT-T-16"
    """Architecture: an open_clip config name, one of clipkd's (ViT-T-16, demo-student, demo-teacher) or a path to an open_clip JSON."""
    pretrained: str | None = None
    """Initial weights: an open_clip tag or a weight file; null starts from random weights."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    model: str | None = None
    """An open_clip name, local-dir:FOLDER, hf-hub:REPO, a transformers CLIPModel folder, or a clipkd run; null trains without a teacher."""
    pretrained: str | None = None
    """Weights of an open_clip name: a tag or a file. The other kinds of teacher carry their own."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    format: Literal["webdataset", "huggingface"] = "webdataset"
    """webdataset: local tar shards; huggingface: a hub name, a save_to_disk folder, or a folder of parquet, arrow or image files."""
    path: str = ""
    """webdataset: a folder of tars, one tar, or a brace pattern such as shards/{00000..00331}.tar; huggingface: name or folder."""
    split: str = "train"
    """Split of a Hugging Face data set; webdataset ignores it."""
    image_column: str = "image"
    """Image column of a Hugging Face data set; webdataset takes the member with an image suffix."""
    caption_key: str = "txt"
    """webdataset: txt for the .txt member, else a key of the .json member; huggingface: the column. A list holds several captions, one is drawn."""
    num_workers: int = 2
    """Loader processes per training process; 0 loads in the training process."""
    min_crop: float = 0.9
    """Smallest random crop, as a share of the image's area; 1 squashes the whole image."""
    background: Literal["white", "random"] = "white"
    """What shows through transparent pixels: white, or a random colour per view (an augmentation for drawings)."""

    def __post_init__(self) -> None:
        require(0 < self.min_crop <= 1, f"data.min_crop is {self.min_crop}; it is a share of the area in (0, 1]")
        require(self.num_workers >= 0, f"data.num_workers is {self.num_workers}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class InfoNCEConfig:
    weight: float = 1.0
    """Weight of the contrastive task loss on the student's own logits (CLIP); 0 leaves it out."""


@dataclass(frozen=True, kw_only=True)
class GKLConfig:
    weight: float = 0.0
    """Weight of the GKL divergence; 0 leaves it out."""
    keys: Keys = "teacher"
    """What the student's queries are compared with: the teacher's features (cross logits) or the student's own."""
    ce_weight: float = 1.0
    """Weight of the soft cross-entropy half (the reference code's alpha)."""
    mse_weight: float = 1.0
    """Weight of the weighted squared-error half (the reference code's beta)."""
    gamma: float = 0.3
    """Smoothing power on the teacher's probabilities as pair weights: 1 plain, 0 uniform."""
    temperature: float = 1.0
    """Softens both sides of the cross-entropy half; multiplies on top of the logit scales."""
    weight_temperature: float = 1.0
    """Softens the teacher's probabilities used as pair weights."""
    row_weight: Literal["reference", "uniform"] = "reference"
    """How queries share the squared-error half: by the mass of their pair weights (published code) or equally."""
    scale_by_temperature_squared: bool = False
    """Multiply the cross-entropy half by temperature² (the published code does not)."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, f"objective.gkl.temperature is {self.temperature}; it must be positive")
        require(
            self.weight_temperature > 0,
            f"objective.gkl.weight_temperature is {self.weight_temperature}; it must be positive",
        )
        require(
            min(self.ce_weight, self.mse_weight) >= 0 < max(self.ce_weight, self.mse_weight),
            f"objective.gkl.ce_weight and mse_weight are {self.ce_weight} and {self.mse_weight}; one must be positive, none negative",
        )
        require(self.gamma >= 0, f"objective.gkl.gamma is {self.gamma}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class SoftTargetConfig:
    weight: float = 0.0
    """Weight of this term; 0 leaves it out."""
    keys: Keys = "teacher"
    """What the student's queries are compared with: the teacher's features (cross logits) or the student's own."""
    temperature: float = 1.0
    """Softens both sides; multiplies on top of the logit scales."""
    scale_by_temperature_squared: bool = False
    """Multiply by temperature² so that the gradient keeps its size (Hinton et al. 2015)."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, f"the temperature of a logit term is {self.temperature}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    weight: float = 0.0
    """Weight of the mean squared error between unit features (CLIP-KD's FD: 2000, divided by the width here as there); 0 leaves it out."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    info_nce: InfoNCEConfig = field(default_factory=InfoNCEConfig)
    """Contrastive task loss."""
    gkl: GKLConfig = field(default_factory=GKLConfig)
    """Generalized Kullback-Leibler divergence (arXiv 2503.08038)."""
    kl: SoftTargetConfig = field(default_factory=SoftTargetConfig)
    """KL divergence from the teacher's distribution."""
    soft_ce: SoftTargetConfig = field(default_factory=SoftTargetConfig)
    """Cross-entropy against the teacher's distribution: KL's gradient, another value."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    """Feature distillation."""
    projection: Literal["linear", "none"] = "linear"
    """Where student and teacher widths differ: a learned linear map of the student's features, or none (then an error)."""


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
        require(0 <= self.ema_momentum < 1, f"optim.ema_momentum is {self.ema_momentum}; it must lie in [0, 1)")
        require(self.warmup_steps >= 0, f"optim.warmup_steps is {self.warmup_steps}; it must be 0 or more")
        require(self.logit_scale_lr >= 0, f"optim.logit_scale_lr is {self.logit_scale_lr}; it must be 0 or more")
        require(self.clip_norm >= 0, f"optim.clip_norm is {self.clip_norm}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 3
    """How many of the newest checkpoints stay on disk."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 1, f"checkpoint.every_steps is {self.every_steps}; it must be 1 or more")
        require(self.keep >= 1, f"checkpoint.keep is {self.keep}; it must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    data: tuple[str, ...] = ()
    """Roots of labelled data to classify zero-shot during training; empty evaluates nothing."""
    task: str | None = None
    """Task YAML for those roots (see eval/); null reads the CLIP_benchmark webdataset layout."""
    every_steps: int = 0
    """Steps between evaluations; 0 evaluates after the last step only."""
    batch_size: int = 256
    """Images per forward pass and process."""

    def __post_init__(self) -> None:
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
        require(self.threads is None or self.threads >= 1, f"threads is {self.threads}; it must be 1 or more")
        require(self.seed >= 0, f"seed is {self.seed}; it must be 0 or more")
        objective = self.objective
        distillation = {name: getattr(objective, name).weight for name in ("gkl", "kl", "soft_ce", "features")}
        for name, weight in {"info_nce": objective.info_nce.weight, **distillation}.items():
            require(weight >= 0 and math.isfinite(weight), f"objective.{name}.weight is {weight}; it must be 0 or more")
        active = [name for name, weight in distillation.items() if weight]
        if self.teacher.model is None:
            require(not active, f"objective.{active[0] if active else ''} needs a teacher: set teacher.model")
            require(objective.info_nce.weight > 0, "no loss term is on: set objective.info_nce.weight or a teacher")
        else:
            require(
                bool(active),
                "a teacher is set but no term uses it: set objective.gkl.weight, kl.weight, soft_ce.weight or "
                "features.weight, or leave teacher.model out",
            )


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The whole configuration as plain lists and numbers, as saved with every run and checkpoint."""
    plain = dataclasses.asdict(config)
    plain["evaluation"]["data"] = list(config.evaluation.data)
    plain["log"]["trackers"] = list(config.log.trackers)
    return plain


def save(config: TrainConfig, path: Path) -> None:
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
