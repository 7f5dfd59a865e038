"""Terms with true pairs as targets, alone or mixed with softened ones."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkd import distributed, losses
from clipkd.config.terms import AFDTerm, ICLTerm, InfoNCETerm, ITCTerm, SigmoidTerm, SoftBCETerm
from clipkd.objective.comparison import Comparison, Pairs, Rows, logits
from clipkd.objective.entry import term
from clipkd.views import Features


@term(InfoNCETerm)
def info_nce(_: InfoNCETerm, batch: Comparison) -> Rows:
    return contrast(batch, batch.student, batch.student_keys, batch.student.logit_scale)


@term(ICLTerm)
def icl(_: ICLTerm, batch: Comparison) -> Rows:
    """Student queries against teacher keys, true pairs as targets (CLIP-KD, arXiv 2307.12732), at a learned scale.

    The released code multiplies by the logarithm of the scale (2.66 at first, not 14.3) and neither synchronises nor
    saves it; here it is a parameter like the others.
    """
    key_ids = None if batch.queue is None else batch.candidate_ids
    return contrast(batch, batch.projected, batch.teacher_candidates, batch.scales["cross"], key_ids=key_ids)


def fusion(student_dim: int, teacher_dim: int) -> dict[str, nn.Module]:
    return {f"{side}_fusion": nn.Linear(2 * teacher_dim, student_dim) for side in ("image", "text")}


@term(AFDTerm, modules=fusion)
def afd(_: AFDTerm, batch: Comparison) -> Rows:
    """CLIP-KD's augmented feature distillation: InfoNCE between fused features of both models, at a learned scale."""
    fused = Pairs(
        *(
            F.normalize(batch.modules[f"{side}_fusion"](torch.cat(pair, dim=-1)), dim=-1)
            for side, pair in zip(Pairs._fields, zip(batch.projected[:2], batch.teacher[:2], strict=True), strict=True)
        )
    )
    keys = Pairs(distributed.gather(fused.image), distributed.gather(fused.text))
    return contrast(batch, fused, keys, batch.scales["fusion"])


def contrast(
    batch: Comparison, queries: Features | Pairs, keys: Pairs, scale: Tensor, *, key_ids: Tensor | None = None
) -> Rows:
    """InfoNCE of both directions. With key_ids, all keys of a query's id are its positives; else its own pair is."""
    loss = batch.tile(losses.info_nce)

    def compute(image: Tensor, text: Tensor, own: Tensor) -> Rows:
        positives = own if key_ids is None else own[:, None] == key_ids
        ways = logits(Pairs(image, text), keys, scale)
        return {"value": torch.stack([loss(way, positives) for way in ways])}

    own = batch.own_columns if key_ids is None else batch.ids
    return batch.in_panels(compute, queries.image, queries.text, own, num_columns=len(keys.text))


@term(SigmoidTerm)
def sigmoid(_: SigmoidTerm, batch: Comparison) -> Rows:
    """One direction: the rows of all processes cover every pair once."""
    scale, bias = batch.student.logit_scale, batch.student.logit_bias
    keys, key_ids, loss = batch.student_keys, batch.batch_ids, batch.tile(losses.sigmoid_loss)
    assert bias is not None

    def compute(image: Tensor, ids: Tensor) -> Rows:
        return {"value": loss(scale * image @ keys.text.T + bias, ids[:, None] == key_ids)[None]}

    return batch.in_panels(compute, batch.student.image, batch.ids, num_columns=len(keys.text))


@term(SoftBCETerm)
def soft_bce(_: SoftBCETerm, batch: Comparison) -> Rows:
    queries, keys = batch.candidates
    teacher, teacher_keys = batch.teacher, batch.teacher_candidates
    bias, teacher_bias = batch.student.logit_bias, teacher.logit_bias
    loss = batch.tile(losses.soft_label_bce)
    assert bias is not None
    assert teacher_bias is not None

    def compute(image: Tensor, text: Tensor, teacher_image: Tensor, teacher_text: Tensor) -> Rows:
        student = logits(Pairs(image, text), keys, batch.student.logit_scale)
        wanted = logits(Pairs(teacher_image, teacher_text), teacher_keys, batch.teacher_scale())
        ways = zip(student, wanted, strict=True)
        return {"value": torch.stack([loss(s + bias, t + teacher_bias) for s, t in ways])}

    return batch.in_panels(compute, *queries[:2], *teacher[:2], num_columns=len(keys.text))


@term(ITCTerm)
def itc(options: ITCTerm, batch: Comparison) -> Rows:
    """ALBEF's image-text contrastive loss on momentum keys (arXiv 2107.07651), a teacher as a third source of targets.

    All logits are at the student's scale, the teacher's at the policy's. The order of a step is ALBEF's: the average was
    updated with the weights of the last step, and the batch is queued after the loss.
    """
    momentum_share, teacher_share = options.shares(batch.step, batch.objective.warmup_steps)
    scale, keys, key_ids = batch.student.logit_scale, batch.momentum_candidates, batch.candidate_ids
    rows, sources = [batch.momentum], [(momentum_share, keys, scale)]
    if teacher_share:
        rows.append(batch.teacher)
        sources.append((teacher_share, batch.teacher_candidates, batch.teacher_scale()))

    def compute(image: Tensor, text: Tensor, ids: Tensor, *others: Tensor) -> Rows:
        positives = ids[:, None] == key_ids
        queries = [Pairs(*others[start : start + 2]) for start in range(0, len(others), 2)]
        softened = [
            (share, logits(own, its_keys, its_scale))
            for own, (share, its_keys, its_scale) in zip(queries, sources, strict=True)
            if share
        ]
        values, entropies = [], []
        for way, student in enumerate(logits(Pairs(image, text), keys, scale)):
            target = losses.mixed_target(positives, [(share, ways[way]) for share, ways in softened]).to(student.dtype)
            values.append(F.cross_entropy(student, target, reduction="none"))
            entropies.append(torch.special.entr(target).sum(dim=-1))
        value, entropy = torch.stack(values), torch.stack(entropies)
        return {"value": value, "kl": value - entropy, "target_entropy": entropy}

    others = [side for features in rows for side in features[:2]]
    return batch.in_panels(compute, *batch.student[:2], batch.ids, *others, num_columns=len(keys.text))
