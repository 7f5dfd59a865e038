"""Terms on features and on relations between student and teacher features."""

import torch
from torch import Tensor

from clipkd import distributed, losses
from clipkd.config.terms import FeaturesTerm, GDTerm, VRDTerm, XRDTerm
from clipkd.objective.comparison import Comparison, Pairs, Rows, logits
from clipkd.objective.entry import term


@term(FeaturesTerm)
def features(_: FeaturesTerm, batch: Comparison) -> Rows:
    """CLIP-KD's FD, the sum over both modalities."""
    student, teacher = batch.projected, batch.teacher
    image = losses.feature_mse(student.image, teacher.image)
    return {"value": (image + losses.feature_mse(student.text, teacher.text))[None]}


@term(GDTerm)
def gd(_: GDTerm, batch: Comparison) -> Rows:
    """CLIP-KD's gradient distillation: squared error of ∂InfoNCE/∂features, summed over modality and role.

    The student's features are those in the teacher's space, its scale the model's own.
    """
    student, scale, keys = batch.projected, batch.student.logit_scale, batch.projected_keys
    teacher, teacher_keys, key_ids = batch.teacher, batch.teacher_keys, batch.batch_ids
    teacher_scale = batch.teacher_scale().to(scale.dtype)
    sides, num_columns = (*student[:2], *teacher[:2]), len(key_ids)

    def both(sides: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Logits of both models."""
        return logits(Pairs(*sides[:2]), keys, scale), logits(Pairs(*sides[2:]), teacher_keys, teacher_scale)

    def normalize(*sides: Tensor) -> Rows:
        return {"sums": torch.stack([way.logsumexp(dim=-1) for model in both(sides) for way in model])}

    # A first pass over the logits: a key's gradient needs the normalizers of the queries of all processes.
    normalizers = distributed.gather(batch.in_panels(normalize, *sides, num_columns=num_columns)["sums"].T).T

    def compute(ids: Tensor, *sides: Tensor) -> Rows:
        found = [
            losses.info_nce_gradients(
                *ways,
                image_keys=its_keys.image,
                text_keys=its_keys.text,
                logit_scale=its_scale,
                positives=ids[:, None] == key_ids,
                image_normalizers=sums[0],
                text_normalizers=sums[1],
            )
            for ways, its_keys, its_scale, sums in zip(
                both(sides),
                (keys, teacher_keys),
                (scale, teacher_scale),
                (normalizers[:2], normalizers[2:].detach()),
                strict=True,
            )
        ]
        errors = [losses.feature_mse(s, t) for s, t in zip(*found, strict=True)]
        return {"value": torch.stack(errors).sum(dim=0, keepdim=True)}

    return batch.in_panels(compute, batch.ids, *sides, num_columns=num_columns)


@term(VRDTerm)
def vrd(_: VRDTerm, batch: Comparison) -> Rows:
    """CLIP-RD's vertical relational distillation (arXiv 2603.25383), as its released code adds it up.

    Within each modality, teacher queries against student keys and the reverse, each modality at a learned scale. The
    images' distributions follow those of the texts (held constant), and both follow the true pairs, which is what trains
    the scales. As in CLIP-KD's, the released scales lack their exponential.
    """
    scales, keys, teacher_keys = (batch.scales["image"], batch.scales["text"]), batch.projected_keys, batch.teacher_keys
    info_nce = batch.tile(losses.info_nce)

    def compute(own: Tensor, *sides: Tensor) -> Rows:
        student, teacher = sides[:2], sides[2:]
        by_teacher = [s * q @ k.T for s, q, k in zip(scales, teacher, keys, strict=True)]
        by_student = [s * q @ k.T for s, q, k in zip(scales, student, teacher_keys, strict=True)]
        divergence = torch.stack([divergence_of(image, text, batch) for image, text in (by_teacher, by_student)])
        pairs = torch.stack([info_nce(way, own) for way in (*by_teacher, *by_student)])
        contrastive = pairs.sum(dim=0, keepdim=True) / 2
        value = divergence.mean(dim=0, keepdim=True) + contrastive
        return {"value": value, "kl": divergence, "info_nce": contrastive}

    sides = (*batch.projected[:2], *batch.teacher[:2])
    return batch.in_panels(compute, batch.own_columns, *sides, num_columns=len(keys.text))


@term(XRDTerm)
def xrd(_: XRDTerm, batch: Comparison) -> Rows:
    """CLIP-RD's cross relational distillation: teacher image with student text should be distributed as teacher text with
    student image, and the reverse; each divergence pulls one side. Its scale is ICL's, which trains it on true pairs.
    """
    scale, keys, teacher_keys = batch.scales["cross"], batch.projected_keys, batch.teacher_keys

    def compute(*sides: Tensor) -> Rows:
        models = logits(Pairs(*sides[2:]), keys, scale), logits(Pairs(*sides[:2]), teacher_keys, scale)
        pairs = [(a, b) for one in models for a, b in (one, one[::-1])]
        return {"value": torch.stack([divergence_of(learner, target, batch) for learner, target in pairs])}

    sides = (*batch.projected[:2], *batch.teacher[:2])
    return batch.in_panels(compute, *sides, num_columns=len(keys.text))


def divergence_of(student_logits: Tensor, target_logits: Tensor, batch: Comparison) -> Tensor:
    """KL of each query, whose target is held constant."""
    statistics = batch.tile(losses.soft_target_statistics)
    return statistics(student_logits, target_logits.detach().log_softmax(dim=-1)).kl
