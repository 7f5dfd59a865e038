"""Terms on features and on relations between student and teacher features."""

import torch
from torch import Tensor

from clipkd import distributed, losses
from clipkd.config.terms import FeatureTerm, GradientTerm
from clipkd.objective.comparison import Comparison, Pair, Rows, products


def features(_: FeatureTerm, comparison: Comparison) -> Rows:
    """CLIP-KD's FD, the sum over both modalities."""
    student, teacher = comparison.projected, comparison.teacher
    image = losses.feature_mse(student.image, teacher.image, reduction="none")
    return {"value": (image + losses.feature_mse(student.text, teacher.text, reduction="none"))[None]}


def gd(_: GradientTerm, comparison: Comparison) -> Rows:
    """CLIP-KD's gradient distillation: squared error of ∂InfoNCE/∂features, summed over modality and role.

    The student's features are those in the teacher's space, its scale the model's own.
    """
    positives = comparison.positives(queue=False)
    normalizers = comparison.root.once("normalizers", make=lambda: contrastive_normalizers(comparison.root))

    def gradients(logits: Pair, keys: Pair, whose: str, scale: Tensor) -> list[Tensor]:
        return losses.info_nce_gradients(
            *logits,
            image_keys=keys[0],
            text_keys=keys[1],
            logit_scale=scale,
            positives=positives,
            image_normalizers=normalizers[whose][0],
            text_normalizers=normalizers[whose][1],
        )

    scale = comparison.student.logit_scale
    teacher_scale = torch.as_tensor(comparison.teacher_scale(0), dtype=scale.dtype, device=scale.device)
    by_student = gradients(projected_logits(comparison), comparison.projected_keys(), "student", scale)
    by_teacher = gradients(
        comparison.teacher_logits(0, queue=False), comparison.batch_keys("teacher"), "teacher", teacher_scale
    )
    errors = [losses.feature_mse(s, t, reduction="none") for s, t in zip(by_student, by_teacher, strict=True)]
    return {"value": torch.stack(errors).sum(dim=0, keepdim=True)}


def projected_logits(comparison: Comparison) -> Pair:
    image, text = products(comparison.projected, comparison.projected_keys())
    scale = comparison.student.logit_scale
    return scale * image, scale * text


def contrastive_normalizers(whole: Comparison) -> dict[str, Pair]:
    """log Σ_j exp(logits_ij) of the queries of all processes, image→text and text→image: a first pass over the logits."""

    def of(panel: Comparison) -> Rows:
        pairs = {"student": projected_logits(panel), "teacher": panel.teacher_logits(0, queue=False)}
        return {whose: torch.stack([way.logsumexp(dim=-1) for way in pair]) for whose, pair in pairs.items()}

    rows = whole.in_panels(of)
    student, teacher = distributed.gather(rows["student"].T), distributed.gather_constant(rows["teacher"].T)
    return {"student": (student[:, 0], student[:, 1]), "teacher": (teacher[:, 0], teacher[:, 1])}


def vrd(_: FeatureTerm, comparison: Comparison) -> Rows:
    """CLIP-RD's vertical relational distillation (arXiv 2603.25383), as its released code adds it up.

    Within each modality, teacher queries against student keys and the reverse, each modality at a scale of its own. The
    images' distributions follow those of the texts (held constant), and both follow the true pairs, which is what trains
    the scales. As in CLIP-KD's, the released scales lack their exponential.
    """
    student, teacher = comparison.projected, comparison.teacher
    student_keys = comparison.projected_keys()
    teacher_keys = comparison.batch_keys("teacher")
    scales = comparison.scales["image"], comparison.scales["text"]
    by_teacher = [s * q @ k.T for s, q, k in zip(scales, (teacher.image, teacher.text), student_keys, strict=True)]
    by_student = [s * q @ k.T for s, q, k in zip(scales, (student.image, student.text), teacher_keys, strict=True)]
    divergence = torch.stack([divergence_of(image, text, comparison) for image, text in (by_teacher, by_student)])
    info_nce = comparison.tile(losses.info_nce)
    logits = (*by_teacher, *by_student)
    pairs = torch.stack([info_nce(way, comparison.own_columns, reduction="none") for way in logits])
    contrastive = pairs.sum(dim=0, keepdim=True) / 2
    value = divergence.mean(dim=0, keepdim=True) + contrastive
    return {"value": value, "kl": divergence, "info_nce": contrastive}


def xrd(_: FeatureTerm, comparison: Comparison) -> Rows:
    """CLIP-RD's cross relational distillation: teacher image with student text should be distributed as teacher text with
    student image, and the reverse; each divergence pulls one side. Its scale is ICL's, which trains it on true pairs.
    """
    teacher, scale = comparison.teacher, comparison.scales["cross"]
    student_keys = comparison.projected_keys()
    by_teacher = [scale * way for way in products(teacher, student_keys)]
    by_student = [scale * way for way in comparison.cosines("teacher", queue=False)]
    pairs = [(a, b) for one in (by_teacher, by_student) for a, b in (one, one[::-1])]
    return {"value": torch.stack([divergence_of(student_side, target, comparison) for student_side, target in pairs])}


def divergence_of(student_logits: Tensor, target_logits: Tensor, comparison: Comparison) -> Tensor:
    """KL of each query, whose target is held constant."""
    statistics = comparison.tile(losses.soft_target_statistics)
    return statistics(student_logits, target_logits.detach().log_softmax(dim=-1)).kl
