"""Terms with true pairs as targets, alone or mixed with softened ones."""

import torch
import torch.nn.functional as F

from clipkd import losses
from clipkd.config.terms import FeatureTerm, InfoNCETerm, InteractiveTerm, MixedTargetTerm, SigmoidTerm, SoftBCETerm
from clipkd.objective.comparison import Comparison, Pair, Rows


def info_nce(term: InfoNCETerm, comparison: Comparison) -> Rows:
    return contrast(comparison.student_logits("student", queue=term.queue), comparison, queue=term.queue)


def icl(term: InteractiveTerm, comparison: Comparison) -> Rows:
    """Student queries against teacher keys, true pairs as targets (CLIP-KD, arXiv 2307.12732), at a scale of its own.

    The released code multiplies by the logarithm of the scale (2.66 at first, not 14.3) and neither synchronises nor
    saves it; here it is a parameter like the others.
    """
    image, text = comparison.cosines("teacher", queue=term.queue)
    scale = comparison.scales["cross"]
    return contrast((scale * image, scale * text), comparison, queue=term.queue)


def afd(_: FeatureTerm, comparison: Comparison) -> Rows:
    """CLIP-KD's augmented feature distillation: InfoNCE between fused features, at a scale of its own."""
    assert comparison.fused is not None
    (image, text), scale = comparison.fused, comparison.scales["fusion"]
    image_keys, text_keys = comparison.fused_keys()
    return contrast((scale * image @ text_keys.T, scale * text @ image_keys.T), comparison, queue=False)


def contrast(logits: Pair, comparison: Comparison, *, queue: bool) -> Rows:
    """InfoNCE of both directions; with a queue an id may stand among the keys more than once."""
    positives = comparison.positives(queue=True) if queue else comparison.own_columns
    info_nce = comparison.tile(losses.info_nce)
    return {"value": torch.stack([info_nce(way, positives, reduction="none") for way in logits])}


def sigmoid(_: SigmoidTerm, comparison: Comparison) -> Rows:
    """One direction: the rows of all processes cover every pair once."""
    bias = comparison.student.logit_bias
    assert bias is not None
    logits = comparison.student_logits("student", queue=False)[0] + bias
    sigmoid_loss = comparison.tile(losses.sigmoid_loss)
    return {"value": sigmoid_loss(logits, comparison.positives(queue=False), reduction="none")[None]}


def soft_bce(term: SoftBCETerm, comparison: Comparison) -> Rows:
    student_bias, teacher_bias = comparison.student.logit_bias, comparison.teacher.logit_bias
    assert student_bias is not None
    assert teacher_bias is not None
    student = comparison.student_logits(term.keys, queue=term.queue)
    teacher = comparison.teacher_logits(0, queue=term.queue)
    bce = comparison.tile(losses.soft_label_bce)
    ways = zip(student, teacher, strict=True)
    return {"value": torch.stack([bce(s + student_bias, t + teacher_bias, reduction="none") for s, t in ways])}


def itc(term: MixedTargetTerm, comparison: Comparison) -> Rows:
    """ALBEF's image-text contrastive loss (arXiv 2107.07651), with a teacher as a third source of targets.

    All logits are at the student's scale, the teacher's at the policy's. A step's order is ALBEF's: the average has been
    updated with the last step's weights, its features are in `comparison`, and the batch is queued after the loss.
    """
    momentum_share, teacher_share = term.shares(comparison.step)
    softened: list[tuple[float, Pair]] = []
    if momentum_share:
        image, text = comparison.momentum_cosines(queue=term.queue)
        scale = comparison.student.logit_scale
        softened.append((momentum_share, (scale * image, scale * text)))
    if teacher_share:
        softened.append((teacher_share, comparison.teacher_logits(0, queue=term.queue)))
    positives = comparison.positives(queue=term.queue)
    values, entropies = [], []
    for way, logits in enumerate(comparison.student_logits(term.keys, queue=term.queue)):
        target = losses.mixed_target(positives, [(share, pair[way]) for share, pair in softened]).to(logits.dtype)
        values.append(F.cross_entropy(logits, target, reduction="none"))
        entropies.append(torch.special.entr(target).sum(dim=-1))
    value, entropy = torch.stack(values), torch.stack(entropies)
    return {"value": value, "kl": value - entropy, "target_entropy": entropy}
