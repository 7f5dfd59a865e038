"""The objectives of CLIP-KD, TinyCLIP, MobileCLIP and their neighbours, for tests to compare with.

Written down from their papers and released code, for one process, without a thought for speed. Every function sees the
whole batch, in float64, and lets autograd through. Nothing here knows the package under test.

Conventions: image and text features are unit-norm [B, d], row i of one belongs to row i of the other; `t_` marks the
teacher's; a scale is the number that multiplies the cosines, 1/τ, not its logarithm. Papers and code that learn the
logarithm of a scale leave the exp() to the caller. A `Model` is image features, text features and scale.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Model = tuple[Tensor, Tensor, Tensor]
Pair = tuple[Tensor, Tensor]


def _own_partner(logits: Tensor) -> Tensor:
    """−mean_i log softmax(logits_i)_i: cross-entropy of each row against its own index."""
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def _kl(logits: Tensor, target_logits: Tensor) -> Tensor:
    """mean_i KL(softmax(target_i) || softmax(logits_i)), the target without gradient. Temperature 1."""
    target = F.softmax(target_logits, dim=1).detach()
    return F.kl_div(F.log_softmax(logits, dim=1), target, reduction="batchmean")


def info_nce(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss: ½ (CE(s I Tᵀ, i) + CE(s T Iᵀ, i)).

    Source: arXiv 2103.00020, figure 3; open_clip `open_clip/loss.py`, ClipLoss.
    """
    return (_own_partner(scale * image @ text.T) + _own_partner(scale * text @ image.T)) / 2


def _soft_targets(student: Model, teacher: Model) -> Tensor:
    """Mean of both directions of −mean_i Σ_j softmax(teacher_i)_j log softmax(student_i)_j."""
    logits, targets = (scale * image @ text.T for image, text, scale in (student, teacher))
    pairs = ((logits, targets), (logits.T, targets.T))
    return sum((F.cross_entropy(s, F.softmax(t, dim=1)) for s, t in pairs), start=logits.new_zeros(())) / 2


def open_clip_distill(student: Model, teacher: Model) -> Tensor:
    """InfoNCE + ½ (soft CE image→text + soft CE text→image), 1:1, as open_clip's trainer sums its two losses.

    Source: open_clip `open_clip/loss.py`, DistillClipLoss.
    """
    return info_nce(*student) + _soft_targets(student, teacher)


def clip_kd(student: Model, projected: Pair, cross_scale: Tensor, teacher: Model) -> dict[str, Tensor]:
    """CLIP-KD: task + CRD + ICL + 2000 FD. The entries are unweighted, `total` is weighted.

    task = InfoNCE(I, T, s)
    crd  = ½ (KL(teacher i→t || student i→t) + KL(teacher t→i || student t→i)), temperature 1
    icl  = ½ (CE(c I' T_tᵀ, i) + CE(c T' I_tᵀ, i)): student queries, teacher candidates
    fd   = MSE(I', I_t) + MSE(T', T_t), mean over all B·d numbers
    where I', T' are the student's features projected to the teacher's width and normalised again.

    Source: arXiv 2307.12732; winycg/CLIP-KD `src/open_clip/loss.py`, KDClipLoss; weights of `script/*_KD/*.sh`.
    Departure: the code multiplies by its learned cross scale without exp(), though it initialises it to log(1/0.07);
    the paper's 1/τ is meant here, so `cross_scale` is the multiplier itself.
    """
    logits, targets = (scale * image @ text.T for image, text, scale in (student, teacher))
    image, text, (t_image, t_text, _) = *projected, teacher
    task = info_nce(*student)
    crd = (_kl(logits, targets) + _kl(logits.T, targets.T)) / 2
    icl = (_own_partner(cross_scale * image @ t_text.T) + _own_partner(cross_scale * text @ t_image.T)) / 2
    fd = F.mse_loss(image, t_image) + F.mse_loss(text, t_text)
    return {"task": task, "crd": crd, "icl": icl, "fd": fd, "total": task + crd + icl + 2000 * fd}


def _contrastive_gradients(queries: Tensor, keys: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """∂/∂queries and ∂/∂keys of CE(s Q Kᵀ, i), by autograd, themselves differentiable."""
    with torch.enable_grad():
        queries, keys = (x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in (queries, keys))
        loss = _own_partner(scale * queries @ keys.T)
        by_query, by_key = torch.autograd.grad(loss, (queries, keys), create_graph=True)
    return by_query, by_key


def gradient_distillation(student: Model, teacher: Model) -> Tensor:
    """CLIP-KD's GD: the student's contrastive gradients on its features resemble the teacher's on its own.

    Σ over {∂L_i→t/∂I, ∂L_i→t/∂T, ∂L_t→i/∂T, ∂L_t→i/∂I} of MSE(student's, teacher's), where L is the one-direction
    InfoNCE (mean over the batch) and MSE is the mean over all B·d numbers. Unweighted.

    Source: arXiv 2307.12732; winycg/CLIP-KD `src/open_clip/loss.py`, get_grad and the use of it in KDClipLoss.
    Departures: autograd in place of the closed form; and the code passes the scale where get_grad wants τ = 1/scale, so
    it divides the cosines by (about) 100. The paper's τ is meant here. The released weight of 1e8 belongs to the
    division: it makes the gradients smaller by about scale². The code takes the student's features after projection
    to the teacher's width where widths differ; so must the caller.
    """
    total = student[0].new_zeros(())
    for queries, keys in ((0, 1), (1, 0)):
        found = (_contrastive_gradients(model[queries], model[keys], model[2]) for model in (student, teacher))
        for mine, wanted in zip(*found, strict=True):
            total = total + F.mse_loss(mine, wanted.detach())
    return total


def augmented_feature(
    projected: Pair, teacher: Pair, image_layer: Pair, text_layer: Pair, fusion_scale: Tensor
) -> Tensor:
    """CLIP-KD's AFD: InfoNCE of fused features, normalise(W [student; teacher] + b), student first.

    A layer is a weight [out, student + teacher width] and a bias [out], as of nn.Linear. Unweighted.

    Source: arXiv 2307.12732; winycg/CLIP-KD `src/open_clip/loss.py`, KDClipLoss.
    Departures: `fusion_scale` is the multiplier itself, where the code lacks the exp(); and the width of the student's
    features after projection is what W must fit (the code sizes W by the width before it, so it runs at equal widths
    only).
    """
    both = zip(projected, teacher, (image_layer, text_layer), strict=True)
    image, text = (F.normalize(F.linear(torch.cat([own, its], dim=1), *layer), dim=1) for own, its, layer in both)
    return info_nce(image, text, fusion_scale)


def clip_rd(
    student: Model, projected: Pair, cross_scale: Tensor, teacher: Model, image_scale: Tensor, text_scale: Tensor
) -> dict[str, Tensor]:
    """CLIP-RD: CLIP-KD (its CRD is called HRD) + VRD + XRD. The entries are unweighted, `total` has 2000 FD, else 1.

    With I', T' the projected student, and KL(target || learner), the target detached, mean over rows:
    vrd = ½ (KL(T_t T'ᵀ || I_t I'ᵀ) + KL(T' T_tᵀ || I' I_tᵀ))
        + ½ (CE(I_t I'ᵀ, i) + CE(I' I_tᵀ, i)) + ½ (CE(T_t T'ᵀ, i) + CE(T' T_tᵀ, i)),
          image logits times image_scale, text logits times text_scale; in the KL only the image logits learn
    xrd = ¼ (KL(T_t I'ᵀ || I_t T'ᵀ) + KL(I_t T'ᵀ || T_t I'ᵀ) + KL(I' T_tᵀ || T' I_tᵀ) + KL(T' I_tᵀ || I' T_tᵀ)),
          all times cross_scale, which ICL shares; each target detached in its own term, so all learn.

    Source: arXiv 2603.25383; Rosieyang01/CLIP-RD `src/open_clip/loss.py`, KDClipLoss; summed as in
    `src/training/train.py`; weights of `script/ViT_B_16_Laion400M/ViT_T_16_RD.sh`.
    Departures: the four learned scales are multipliers, where the code lacks the exp(). Where widths differ, the code
    takes the task and HRD on the projected features; CLIP-KD, and this function, on the student's own (pass the
    projected ones twice for the code's way).
    """
    parts = clip_kd(student, projected, cross_scale, teacher)
    image, text, (t_image, t_text, _) = *projected, teacher

    from_image, from_text = image_scale * t_image @ image.T, text_scale * t_text @ text.T  # teacher → student
    to_image, to_text = from_image.T, from_text.T
    vrd = (_kl(from_image, from_text) + _kl(to_image, to_text)) / 2
    vrd = vrd + sum(map(_own_partner, (from_image, to_image, from_text, to_text))) / 2

    teacher_image, teacher_text = cross_scale * t_image @ text.T, cross_scale * t_text @ image.T
    pairs = ((teacher_image, teacher_text), (teacher_text.T, teacher_image.T))
    xrd = sum((_kl(a, b) + _kl(b, a) for a, b in pairs), start=vrd.new_zeros(())) / 4
    return {**parts, "vrd": vrd, "xrd": xrd, "total": parts["total"] + vrd + xrd}


def tinyclip(image: Tensor, text: Tensor, t_image: Tensor, t_text: Tensor, scale: float = 50.0) -> Tensor:
    """TinyCLIP's affinity mimicking: ½ (soft CE image→text + soft CE text→image), no hard labels.

    Source: arXiv 2309.12314; wkcn/TinyCLIP `src/open_clip/clip_soft_loss.py`, ClipSoftLoss; `src/training/train.py`
    with its defaults distillation_alpha = distillation_weight = 1; `--logit-scale 50` of `script/*.sh`, both sides.
    Departures: none at the second step and after. The code sets the student's scale to 50 after each step, so its
    first step has the scale of the checkpoint. The terms of its learned pruning masks are another matter.
    """
    return _soft_targets((image, text, torch.tensor(scale)), (t_image, t_text, torch.tensor(scale)))


def mobileclip(image: Tensor, text: Tensor, scale: Tensor, teachers: list[Model], lam: float) -> Tensor:
    """MobileCLIP, one caption: (1 − λ) InfoNCE + λ · ½ Σ over directions of CE(mean_k softmax(teacher k), student).

    A teacher is (image features, text features, scale). The paper's mean over teachers of KL(teacher k || student)
    differs by the teachers' entropy, which has no gradient for the student.

    Source: arXiv 2311.17049; apple/ml-mobileclip `training/open_clip_v1.patch`, DistillClipLoss with
    `--distill-average-after-softmax`; `training/configs/*.sh` (λ is 1 or 0.75 there).
    Departures: one scale per teacher, as the paper and the repository's v2 patch have it, where v1 has one for all;
    and each direction has its own softmax, as in the code with local loss or one process (without local loss the code
    transposes the image→text softmax instead). The synthetic caption adds a second such sum.
    """
    targets_per_image = sum((F.softmax(s * i @ t.T, dim=1) for i, t, s in teachers), start=image.new_zeros(()))
    targets_per_text = sum((F.softmax(s * t @ i.T, dim=1) for i, t, s in teachers), start=image.new_zeros(()))
    per_image = F.cross_entropy(scale * image @ text.T, targets_per_image / len(teachers))
    per_text = F.cross_entropy(scale * text @ image.T, targets_per_text / len(teachers))
    return (1 - lam) * info_nce(image, text, scale) + lam * (per_image + per_text) / 2


def _pairwise(logits: Tensor, labels: Tensor) -> Tensor:
    """−(1/B) Σ_ij (y_ij log σ(l_ij) + (1 − y_ij) log(1 − σ(l_ij))); log(1 − σ(l)) is written log σ(−l), to stay finite."""
    total = logits.new_zeros(())
    for i in range(len(logits)):
        for j in range(len(logits)):
            logit, label = logits[i, j], labels[i, j]
            total = total - label * F.logsigmoid(logit) - (1 - label) * F.logsigmoid(-logit)
    return total / len(logits)


def siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """−(1/B) Σ_ij log σ(z_ij (s I_i·T_j + b)), z = 1 on the diagonal and −1 off it.

    Source: arXiv 2303.15343; open_clip `open_clip/loss.py`, SigLipLoss.
    """
    return _pairwise(scale * image @ text.T + bias, torch.eye(len(image)))


def soft_bce(student: Model, bias: Tensor, teacher: Model, t_bias: Tensor) -> Tensor:
    """SigLIP's loss with the teacher's probabilities σ(s_t I_t·T_t + b_t) in place of the labels 1 and 0.

    Source: binary cross-entropy, on the logits and with the normaliser of SigLIP (arXiv 2303.15343). There is no released
    code behind this one.
    """
    logits, targets = (scale * image @ text.T for image, text, scale in (student, teacher))
    return _pairwise(logits + bias, torch.sigmoid(targets + t_bias).detach())


def gkl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    ce_weight: float,
    mse_weight: float,
    gamma: float,
    temperature: float,
    class_prior: Tensor | None = None,
) -> Tensor:
    """GKL: ce_weight · CE(softmax(t/T), softmax(s/T)) + mse_weight · wMSE. Logits [B, C].

    wMSE = ¼ Σ_ijk w_ij w_ik ((t_ij − t_ik) − (s_ij − s_ik))² / Σ_ijk w_ij w_ik, the logits without temperature, and
    w = softmax(t)^γ; or, with a class prior, w = class_prior^γ, where row i of [B, C] is the prior of sample i's
    class (the mean of the teacher's softmax(t) over the samples of the class, in the reference).

    Source: arXiv 2503.08038; jiequancui/DKL `DKLv2/KD-dkl/mdistiller/distillers/GKL_KD.py`, dkl_loss: its alpha is
    ce_weight, its beta mse_weight, its T2 is 1. No factor T², and no warm-up of the sum here.
    Departure: the weights are detached, as the papers' sg(w) has it; the code detaches the prior only, but its teacher
    runs without gradient. The teacher is detached in the cross-entropy, as in the code.
    """
    teacher_gaps = teacher_logits[:, :, None] - teacher_logits[:, None, :]
    student_gaps = student_logits[:, :, None] - student_logits[:, None, :]
    weights = F.softmax(teacher_logits, dim=1) if class_prior is None else class_prior
    weights = (weights**gamma).detach()
    pairs = weights[:, :, None] * weights[:, None, :]
    weighted_mse = ((teacher_gaps - student_gaps) ** 2 * pairs).sum() / pairs.sum() / 4

    targets = F.softmax(teacher_logits / temperature, dim=1).detach()
    cross_entropy = -(targets * F.log_softmax(student_logits / temperature, dim=1)).sum(dim=1).mean()
    return ce_weight * cross_entropy + mse_weight * weighted_mse


def dkl_gradients(
    student_logits: Tensor, teacher_logits: Tensor, *, ce_weight: float, mse_weight: float
) -> tuple[Tensor, Tensor]:
    """(ce_weight · ∂KL/∂student, mse_weight · ∂KL/∂teacher) of KL(softmax(t) || softmax(s)), summed over rows, / B.

    Theorem 1: KL has the gradients of the decoupled loss, whose cross-entropy (teacher detached) gives all of the
    student's and whose wMSE (weights and student detached) all of the teacher's, so each weight scales one of the two.
    GKL does not detach the student in the wMSE: its student gradient, at γ = T = 1, is the first minus the second.

    Source: arXiv 2305.13948, theorem 1; no code: F.kl_div and autograd.
    """
    student = student_logits.detach().requires_grad_()
    teacher = teacher_logits.detach().requires_grad_()
    with torch.enable_grad():
        divergence = F.kl_div(
            F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1), reduction="sum", log_target=True
        )
        by_student, by_teacher = torch.autograd.grad(divergence / len(student), (student, teacher))
    return ce_weight * by_student, mse_weight * by_teacher


@dataclass(eq=False)
class Albef:
    """ALBEF's image-text contrastive loss with momentum distillation, one process.

    One step, in the published order: clamp the temperature; student features; move the momentum model towards the
    student; momentum features (no gradient); candidates = momentum features of the batch, then the queue; targets
    α' softmax(s · momentum query · candidates) + (1 − α') hard, α' = α min(1, step / ramp_steps); cross-entropy of
    the student's queries against the same candidates, mean of both directions; append the momentum features to the
    queue. `hard` is every candidate of the same id, in equal shares.

    Source: arXiv 2107.07651; salesforce/ALBEF `models/model_pretrain.py` (clamp, own partner) and
    `models/model_retrieval.py` (ids; no clamp there); the ramp in `Pretrain.py` and `Retrieval.py`, where it is the
    first epoch. Its clamp of temp to [0.001, 0.5] is a scale in [2, 1000]; here the least is 1.
    Departures: the queue starts empty instead of random, so only filled slots are candidates, and it takes any batch
    size; the temperature is learned as the log of its inverse; floating buffers are averaged as parameters are.

    `student` has encode_image and encode_text, both to unit features, and a parameter logit_scale, the log of the
    multiplier. The momentum model is a copy, in the mode (train or eval) that the student has at construction. Its own
    logit scale is averaged and never used.
    """

    student: nn.Module
    queue_size: int
    momentum: float
    alpha: float
    ramp_steps: int
    max_scale: float
    queue: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)
    """(image feature, text feature, id), oldest first."""

    def __post_init__(self) -> None:
        self.momentum_model = copy.deepcopy(self.student).requires_grad_(False)

    def step(self, images: Tensor, texts: Tensor, ids: Tensor | Sequence[int], step: int) -> Tensor:
        """The loss of one batch, for the caller to differentiate and step on. `step` counts from 0."""
        with torch.no_grad():
            self.student.logit_scale.clamp_(0, math.log(self.max_scale))
        scale = self.student.logit_scale.exp()
        image = self.student.encode_image(images)
        text = self.student.encode_text(texts)
        batch_ids = [int(i) for i in ids]

        with torch.no_grad():
            self._update_momentum_model()
            image_m = self.momentum_model.encode_image(images)
            text_m = self.momentum_model.encode_text(texts)
            candidate_images = torch.stack([*image_m, *(entry[0] for entry in self.queue)])
            candidate_texts = torch.stack([*text_m, *(entry[1] for entry in self.queue)])
            candidate_ids = batch_ids + [entry[2] for entry in self.queue]

            hard = torch.tensor([[float(own == other) for other in candidate_ids] for own in batch_ids]).to(image_m)
            hard = hard / hard.sum(dim=1, keepdim=True)

            alpha = self.alpha * min(1.0, step / self.ramp_steps) if self.ramp_steps > 0 else self.alpha
            targets_per_image = alpha * F.softmax(scale * image_m @ candidate_texts.T, dim=1) + (1 - alpha) * hard
            targets_per_text = alpha * F.softmax(scale * text_m @ candidate_images.T, dim=1) + (1 - alpha) * hard

        per_image = F.log_softmax(scale * image @ candidate_texts.T, dim=1)
        per_text = F.log_softmax(scale * text @ candidate_images.T, dim=1)
        loss_per_image = -(targets_per_image * per_image).sum(dim=1).mean()
        loss_per_text = -(targets_per_text * per_text).sum(dim=1).mean()

        self.queue.extend(zip(image_m, text_m, batch_ids, strict=True))
        while len(self.queue) > self.queue_size:
            self.queue.pop(0)
        return (loss_per_image + loss_per_text) / 2

    def _update_momentum_model(self) -> None:
        """θ_m ← m θ_m + (1 − m) θ."""
        pairs = [
            *zip(self.momentum_model.parameters(), self.student.parameters(), strict=True),
            *zip(self.momentum_model.buffers(), self.student.buffers(), strict=True),
        ]
        for average, current in pairs:
            if average.is_floating_point():
                average.copy_(average * self.momentum + current * (1 - self.momentum))
