"""Closed-set distillation: class prompts, the teacher's class vectors and the running class prior."""

import hashlib
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipkd import distributed
from clipkd.config.terms import ClosedSetTerm
from clipkd.evaluation import zeroshot
from clipkd.models.encoder import Encoder
from clipkd.models.imagenet import imagenet_prompts
from clipkd.objective.memory import ClassPrior


class ClosedSet:
    """Class prompts as the student's tokens, the frozen teacher's class vectors, and the running class prior."""

    def __init__(
        self, prompts: list[Int[Tensor, "k t"]], teacher_classes: Float[Tensor, "k d"], *, class_prior: bool
    ) -> None:
        """prompts: tokens of all classes, one tensor per template."""
        self.prompts, self.teacher_classes = prompts, teacher_classes
        self.prior = ClassPrior(len(teacher_classes), device=teacher_classes.device) if class_prior else None

    def prompts_at(self, step: int) -> Int[Tensor, "k t"]:
        """This process's share of the prompts that the student trains on at a step: the templates take turns.

        Shares are equal in number: the last prompt may stand in several, and `Distiller.loss` cuts the rest off.
        """
        prompts, ranks = self.prompts[step % len(self.prompts)], distributed.world_size()
        if ranks == 1:
            return prompts
        share = torch.arange(-(-len(prompts) // ranks), device=prompts.device)
        return prompts[(share + distributed.rank() * len(share)).clamp(max=len(prompts) - 1)]


def open_closed_set(
    term: ClosedSetTerm, *, student: Encoder, teacher_classes: Float[Tensor, "k d"], device: torch.device
) -> ClosedSet:
    """Tokenize every prompt for the student and put all tensors on a device.

    Raises: ValueError or FileNotFoundError naming the option.
    """
    classnames, templates = read_classes(term)
    prompts = [
        student.spec.tokenize([template.replace("{c}", name) for name in classnames]).to(device)
        for template in templates
    ]
    return ClosedSet(prompts, teacher_classes.to(device), class_prior=term.class_prior)


@torch.no_grad()
def class_vectors(term: ClosedSetTerm, teacher: Encoder, device: torch.device) -> Float[Tensor, "k d"]:
    """Compute a teacher's class vectors on the device: the mean over all templates, as in zero-shot classification."""

    def encode_texts(texts: list[str]) -> Tensor:
        return teacher.encode_text(teacher.spec.tokenize(texts).to(device))

    return zeroshot.build_classifier(encode_texts, *read_classes(term))


def closed_set_fingerprint(term: ClosedSetTerm) -> str:
    """SHA-256 of class names and templates, by which a resumed run checks that its classes are the same."""
    return hashlib.sha256(repr(read_classes(term)).encode()).hexdigest()


def read_classes(term: ClosedSetTerm) -> tuple[list[str], list[str]]:
    """Read class names and templates.

    Raises: FileNotFoundError if the file is missing; ValueError if it names fewer than two classes or one twice.
    """
    if term.classes == "imagenet":
        classnames, templates = imagenet_prompts()
        return classnames, list(term.templates) or templates
    path = Path(term.classes)
    if not path.is_file():
        raise FileNotFoundError(f"objective.closed_set.classes: no file {path}; one class name per line, or imagenet")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"objective.closed_set.classes: {path} is not UTF-8 text ({error})") from error
    classnames = [line.strip() for line in lines if line.strip()]
    twice = sorted({name for name in classnames if classnames.count(name) > 1})
    if len(classnames) < 2 or twice:
        what = f"{twice[0]!r} twice" if twice else f"only {classnames}"
        raise ValueError(
            f"objective.closed_set.classes: {path} names {what}; it must name two classes or more, each once"
        )
    return classnames, list(term.templates) or ["a photo of a {c}."]
