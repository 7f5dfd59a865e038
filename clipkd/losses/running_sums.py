"""GKL's statistics of a query from sums over its keys, a tile at a time, and the gradient of a tile from what they come to.

With s and u a row of student and teacher logits, m their maxima, d = u − s, and T, T_w, γ as in `row_statistics`:

    Σ e^{(s−m)/T}, Σ e^{s−m};   e = e^{(u−m)/T}: Σ e, Σ e (s−m), Σ e (u−m);   w = e^{γ(u−m)/T_w}: Σ w, mean and squares of d
    about it under w;   Σ e^{(u−m)/T_w}

Two tiles' sums merge by bringing both to the larger maximum; squares merge by the distance of the means (Chan et al. 1979),
which keeps the digits of a small variance.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

EMPTY = -1e30
"""Maximum of no logits: finite, as 0 · ∞ is not a number."""


class Powers(NamedTuple):
    temperature: float
    weight_temperature: float
    gamma: float


NUM_SUMS = 11


def no_sums(num: int, like: Tensor) -> Float[Tensor, "11 n"]:
    """Running sums of queries that have seen no key."""
    state = torch.zeros(NUM_SUMS, num, dtype=like.dtype, device=like.device)
    state[0] = state[3] = EMPTY
    return state


def running_sums(student: Float[Tensor, "n m"], teacher: Float[Tensor, "n m"], powers: Powers) -> Float[Tensor, "11 n"]:
    """Of each query over its keys, exponentials relative to its largest logit: what `logarithms` and `finish` need."""
    temperature, weight_temperature, gamma = powers
    student_max, teacher_max = student.amax(dim=1), teacher.amax(dim=1)
    s, u = student - student_max[:, None], teacher - teacher_max[:, None]
    softened = (s / temperature).exp().sum(dim=1)
    contrast = softened if temperature == 1 else s.exp().sum(dim=1)
    target = (u / temperature).exp()
    mass = target.sum(dim=1) if weight_temperature == temperature else (u / weight_temperature).exp().sum(dim=1)
    weight = (u * (gamma / weight_temperature)).exp()
    total, difference = weight.sum(dim=1), teacher - student
    mean = (weight * difference).sum(dim=1) / total
    squares = (weight * (difference - mean[:, None]).square()).sum(dim=1)
    with_student, with_teacher = (target * s).sum(dim=1), (target * u).sum(dim=1)
    student_side = [student_max, softened, contrast]
    teacher_side = [teacher_max, target.sum(dim=1), with_student, with_teacher]
    return torch.stack([*student_side, *teacher_side, total, mean, squares, mass])


def merge(a: Float[Tensor, "11 n"], b: Float[Tensor, "11 n"], powers: Powers) -> Float[Tensor, "11 n"]:
    """Running sums over both's keys."""
    temperature, weight_temperature, gamma = powers
    student_max, teacher_max = torch.maximum(a[0], b[0]), torch.maximum(a[3], b[3])
    moved = []
    for state in (a, b):
        s, u = state[0] - student_max, state[3] - teacher_max
        softened, contrast = state[1] * (s / temperature).exp(), state[2] * s.exp()
        by_target, by_weight = (u / temperature).exp(), (u * (gamma / weight_temperature)).exp()
        with_student, with_teacher = state[5] + state[4] * s, state[6] + state[4] * u
        sums = [softened, contrast, by_target * state[4], by_target * with_student, by_target * with_teacher]
        mass = state[10] * (u / weight_temperature).exp()
        moved.append((torch.stack([*sums, mass]), by_weight * state[7], state[8], by_weight * state[9]))
    (sums_a, total_a, mean_a, squares_a), (sums_b, total_b, mean_b, squares_b) = moved
    softened, contrast, target, with_student, with_teacher, mass = sums_a + sums_b
    total, apart = total_a + total_b, mean_b - mean_a
    mean = mean_a + apart * total_b / total
    squares = squares_a + squares_b + apart.square() * total_a * total_b / total
    student_side, teacher_side = [student_max, softened, contrast], [teacher_max, target, with_student, with_teacher]
    return torch.stack([*student_side, *teacher_side, total, mean, squares, mass])


def logarithms(state: Float[Tensor, "11 n"], powers: Powers) -> Float[Tensor, "5 n"]:
    """By which a tile's exponentials become probabilities: of the softened student, the student, the target, the pair
    weights; and the mean difference.
    """
    temperature, weight_temperature, gamma = powers
    student_max, softened, contrast, teacher_max, target = state[:5]
    weights = gamma * teacher_max / weight_temperature + state[7].log()
    student = [student_max / temperature + softened.log(), student_max + contrast.log()]
    return torch.stack([*student, teacher_max / temperature + target.log(), weights, state[8]])


def finish(state: Float[Tensor, "11 n"], logs: Float[Tensor, "5 n"], powers: Powers) -> list[Float[Tensor, "n"]]:
    """Cross-entropy, teacher entropy, variance, log weight mass, log normalizer."""
    temperature, weight_temperature, gamma = powers
    _, softened, _, teacher_max, target, with_student, with_teacher, total, _, squares, mass = state
    ce = softened.log() - with_student / (temperature * target)
    entropy = target.log() - with_teacher / (temperature * target)
    log_mass = logs[3] - gamma * (teacher_max / weight_temperature + mass.log())
    return [ce, entropy, squares / total, log_mass, logs[1]]


def slopes(
    student: Float[Tensor, "n m"], teacher: Float[Tensor, "n m"], asked: Float[Tensor, "8 _ _"], powers: Powers
) -> Float[Tensor, "n m"]:
    """∂loss/∂student logits by one direction's queries; asked: upstream gradients of CE, variance and log normalizer,
    then `logarithms`, each along the queries and 1 wide along the keys.
    """
    temperature, weight_temperature, gamma = powers
    ce, variance, normalizer, log_softened, log_student, log_target, log_weight, mean = asked
    target = (teacher / temperature - log_target).exp()
    weight = (teacher * (gamma / weight_temperature) - log_weight).exp()
    if temperature == 1:
        slope = (ce + normalizer) * (student - log_student).exp()
    else:
        slope = ce / temperature * (student / temperature - log_softened).exp()
        slope += normalizer * (student - log_student).exp()
    return slope - ce / temperature * target - 2 * variance * weight * (teacher - student - mean)
