"""`query_statistics`: equal to literal loops and to the plain form, with its gradients."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from clipkd.losses import QueryStatistics, info_nce, query_statistics, row_statistics
from tests.losses.random_features import GRID, Features, random_features

FIELDS = ("ce", "kl", "teacher_entropy", "variance", "log_weight_mass", "info_nce")
WITH_GRADIENT = ("ce", "kl", "variance", "info_nce")


def plain(x: Features, *, logit_scale: Any, teacher_logit_scale: float, positives: Tensor, **options: Any) -> Any:
    """`row_statistics` and `info_nce` on whole matrices."""
    student, teacher = logit_scale * x[0] @ x[1].T, teacher_logit_scale * x[2] @ x[3].T
    found = row_statistics(student, teacher, **options)
    return QueryStatistics(**vars(found), info_nce=info_nce(student, positives))


def weigh(found: Any) -> Tensor:
    """Every statistic of every query with a weight of its own: upstream gradients that differ."""
    values = torch.stack([getattr(found, name) for name in WITH_GRADIENT])
    return (values * torch.linspace(0.5, 2, values.numel(), dtype=values.dtype).view_as(values)).sum()


def gradients(loss: Callable[..., Tensor], features: Features, scale: float, *, keys: bool) -> Sequence[Tensor]:
    """Of queries, scale and, if wanted, keys."""
    leaves = [features[0].clone(), torch.tensor(scale, dtype=features[0].dtype), features[1].clone()][: 2 + keys]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    moved = (leaves[0], leaves[2] if keys else features[1], *features[2:])
    return torch.autograd.grad(loss(moved, leaves[1]), leaves)


@pytest.mark.parametrize(("gamma", "variance", "log_mass"), [(1.0, 3 / 16, 0.0), (0.0, 1 / 4, math.log(2))])
def test_two_keys_by_hand(gamma: float, variance: float, log_mass: float) -> None:
    """Student logits 0 and 0, teacher logits 0 and ln 3: probabilities ½, ½ and ¼, ¾."""
    student = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    teacher = torch.tensor([[1.0]]), torch.tensor([[0.0], [1.0]])
    found = query_statistics(
        *student, *teacher, logit_scale=9.0, teacher_logit_scale=math.log(3), gamma=gamma, positives=torch.tensor([1])
    )
    entropy = math.log(4) - 0.75 * math.log(3)
    expected = [math.log(2), math.log(2) - entropy, entropy, variance * math.log(3) ** 2, log_mass, math.log(2)]
    assert [getattr(found, name).item() for name in FIELDS] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("temperature", "weight_temperature", "gamma", "scale"), GRID)
def test_values_and_gradients_are_those_of_the_plain_form_in_any_panels(
    temperature: float, weight_temperature: float, gamma: float, scale: float
) -> None:
    features = random_features(4, 7)
    options: dict[str, Any] = {"teacher_logit_scale": 0.7 * scale, "positives": torch.tensor([0, 6, 2, 3])}
    options |= {"temperature": temperature, "weight_temperature": weight_temperature, "gamma": gamma}
    whole = plain(features, logit_scale=scale, **options)
    of_plain = partial(gradients, lambda x, a: weigh(plain(x, logit_scale=a, **options)), features, scale)
    expected = [of_plain(keys=keys) for keys in (False, True)]
    for tile_size in (1, 3, 50):
        found = query_statistics(*features, logit_scale=scale, tile_size=tile_size, **options)
        for name in FIELDS:
            torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-12, atol=1e-12)

        def loss(x: Features, a: Tensor, tile_size: int = tile_size) -> Tensor:
            return weigh(query_statistics(*x, logit_scale=a, tile_size=tile_size, **options))

        for keys in (False, True):
            for a, b in zip(gradients(loss, features, scale, keys=keys), expected[keys], strict=True):
                assert (a - b).norm() <= 1e-12 * max(1, b.norm())


@pytest.mark.parametrize("tile_size", [40, 2048])
@pytest.mark.parametrize("keys", [False, True], ids=["constant keys", "moving keys"])
@pytest.mark.parametrize(
    ("dtype", "matmul_dtype", "tolerance"),
    [(torch.float32, None, 1e-5), (torch.float32, torch.float16, 3e-3), (torch.float64, torch.float32, 1e-5)],
    ids=str,
)
def test_gradients_keep_their_digits_at_scale_100(
    dtype: torch.dtype, matmul_dtype: torch.dtype | None, tolerance: float, keys: bool, tile_size: int
) -> None:
    own = torch.arange(64)

    def loss(x: Features, a: Tensor, matmul_dtype: torch.dtype | None = matmul_dtype) -> Tensor:
        options: dict[str, Any] = {"positives": own, "gamma": 0.3, "tile_size": tile_size, "matmul_dtype": matmul_dtype}
        rows: Any = query_statistics(*x, logit_scale=a, teacher_logit_scale=100.0, **options)
        return rows.ce.mean() + 0.1 * rows.variance.mean() + rows.info_nce.mean()

    exact = gradients(partial(loss, matmul_dtype=None), random_features(64, 96), 100.0, keys=keys)
    found = gradients(loss, random_features(64, 96, dtype=dtype), 100.0, keys=keys)
    for a, b in zip(found, exact, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() <= tolerance


@pytest.mark.parametrize(("temperature", "tile_size"), [(1.0, 3), (2.0, 3), (2.0, 2048)])
@pytest.mark.parametrize("positives", [None, torch.tensor([3, 0, 4])], ids=["soft", "contrastive"])
def test_gradcheck(positives: Tensor | None, temperature: float, tile_size: int) -> None:
    queries, keys, *teacher = (each[:, :6].contiguous() for each in random_features(3, 5))

    def values(queries: Tensor, keys: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {
            "logit_scale": scale,
            "teacher_logit_scale": 4.0,
            "tile_size": tile_size,
            "gamma": 0.3,
        }
        found = query_statistics(queries, keys, *teacher, positives=positives, temperature=temperature, **options)
        assert (found.info_nce is None) == (positives is None)
        assert not found.teacher_entropy.requires_grad
        assert not found.log_weight_mass.requires_grad
        return tuple(getattr(found, name) for name in WITH_GRADIENT if getattr(found, name) is not None)

    scale = torch.tensor(6.0, dtype=torch.float64)
    for wanted in ((True, True, True), (True, False, False), (False, False, True), (False, True, False)):
        leaves = [x.detach().requires_grad_(y) for x, y in zip((queries, keys, scale), wanted, strict=True)]
        assert torch.autograd.gradcheck(values, leaves, fast_mode=not all(wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys", [False, True])
def test_autocast_changes_nothing(dtype: torch.dtype, keys: bool) -> None:
    def loss(x: Features, a: Tensor) -> Tensor:
        return weigh(query_statistics(*x, logit_scale=a, teacher_logit_scale=90.0, positives=torch.arange(16)))

    features = random_features(16, 24, dtype=torch.float32)
    expected = gradients(loss, features, 100.0, keys=keys)
    with torch.autocast("cpu", dtype):
        found = gradients(loss, features, 100.0, keys=keys)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    half = tuple(each.to(dtype) for each in features)
    assert query_statistics(*half, logit_scale=9.0, teacher_logit_scale=9.0).ce.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: (x, {"tile_size": 0}), "tile_size is 0"),
        (lambda x: (x, {"gamma": -1.0}), "gamma is -1.0"),
        (lambda x: (x, {"matmul_dtype": torch.bfloat16}), "matmul_dtype is torch.bfloat16"),
        (lambda x: (x, {"positives": torch.arange(3)}), r"positives is of shape \(3,\).* one column per query: 5"),
        (lambda x: ([x[0][:4], *x[1:]], {}), r"shapes \[\(4, 32\), .*\(5, 40\), .*need n × d"),
        (lambda x: ([x[0], x[1][:, :9], *x[2:]], {}), r"shapes \[\(5, 32\), \(7, 9\), .*need n × d"),
    ],
)
def test_wrong_arguments_are_refused(change: Callable[..., Any], words: str, unchecked_shapes: None) -> None:
    features, options = change(random_features(5, 7))
    with pytest.raises(ValueError, match=words):
        query_statistics(*features, logit_scale=1.0, teacher_logit_scale=1.0, **options)
