"""Terms on features and on relations between student and teacher features."""

import torch
import torch.nn.functional as F

from clipkd import distributed, losses
from clipkd.comparison import Comparison, Value, products
from clipkd.term_options import FeatureTerm, GradientTerm


def features(_: FeatureTerm, comparison: Comparison) -> Value:
    """CLIP-KD's FD, the sum over both modalities."""
    student, teacher = comparison.projected, comparison.teacher
    return losses.feature_mse(student.image, teacher.image) + losses.feature_mse(student.text, teacher.text), {}


def gd(_: GradientTerm, comparison: Comparison) -> Value:
    """CLIP-KD's gradient distillation: squared error of ∂InfoNCE/∂features, summed over modality and role.

    The student's features are those in the teacher's space, its scale the model's own.
    """
    positives = comparison.positives(queue=False)
    image_keys, text_keys = comparison.projected_keys()
    per_image, per_text = products(comparison.projected, (image_keys, text_keys))
    scale = comparison.student.logit_scale
    student_gradients = losses.info_nce_gradients(
        scale * per_image,
        scale * per_text,
        image_keys=image_keys,
        text_keys=text_keys,
        logit_scale=scale,
        positives=positives,
        image_normalizers=distributed.gather((scale * per_image).logsumexp(dim=-1)),
        text_normalizers=distributed.gather((scale * per_text).logsumexp(dim=-1)),
    )
    teacher_scale = torch.as_tensor(comparison.teacher_scale(0), dtype=scale.dtype, device=scale.device)
    per_image, per_text = comparison.teacher_logits(0, queue=False)
    image_keys, text_keys = comparison.batch_keys("teacher")
    teacher_gradients = losses.info_nce_gradients(
        per_image,
        per_text,
        image_keys=image_keys,
        text_keys=text_keys,
        logit_scale=teacher_scale,
        positives=positives,
        image_normalizers=distributed.gather_constant(per_image.logsumexp(dim=-1)),
        text_normalizers=distributed.gather_constant(per_text.logsumexp(dim=-1)),
    )
    errors = [F.mse_loss(s, t) for s, t in zip(student_gradients, teacher_gradients, strict=True)]
    return torch.stack(errors).sum(), {}


def vrd(_: FeatureTerm, comparison: Comparison) -> Value:
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
    divergence = torch.stack([losses.kl(image, text) for image, text in (by_teacher, by_student)]).mean()
    pairs = [losses.info_nce(logits, comparison.own_columns) for logits in (*by_teacher, *by_student)]
    contrastive = torch.stack(pairs).sum() / 2
    return divergence + contrastive, {"kl": divergence, "info_nce": contrastive}


def xrd(_: FeatureTerm, comparison: Comparison) -> Value:
    """CLIP-RD's cross relational distillation: teacher image with student text should be distributed as teacher text with
    student image, and the reverse; each divergence pulls one side. Its scale is ICL's, which trains it on true pairs.
    """
    teacher, scale = comparison.teacher, comparison.scales["cross"]
    student_keys = comparison.projected_keys()
    by_teacher = [scale * way for way in products(teacher, student_keys)]
    by_student = [scale * way for way in comparison.cosines("teacher", queue=False)]
    pairs = [(a, b) for one in (by_teacher, by_student) for a, b in (one, one[::-1])]
    return torch.stack([losses.kl(student_side, target) for student_side, target in pairs]).mean(), {}
