"""`query_statistics`: equal to literal loops and to the plain form, with its gradients."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from clipkd.losses import query_statistics, row_statistics
from tests.losses.random_features import GRID, Features, random_features

FIELDS = ("ce", "kl", "teacher_entropy", "variance", "log_weight_mass")
WITH_GRADIENT = ("ce", "kl", "variance")


def plain(x: Features, *, logit_scale: Any, teacher_logit_scale: float, **options: Any) -> Any:
    """`row_statistics` on whole matrices."""
    return row_statistics(logit_scale * x[0] @ x[1].T, teacher_logit_scale * x[2] @ x[3].T, **options)


def weigh(found: Any, names: Sequence[str] = WITH_GRADIENT) -> Tensor:
    """Every statistic of every query with a weight of its own: upstream gradients that differ."""
    values = torch.stack([getattr(found, name) for name in names])
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
    found = query_statistics(*student, *teacher, logit_scale=9.0, teacher_logit_scale=math.log(3), gamma=gamma)
    entropy = math.log(4) - 0.75 * math.log(3)
    expected = [math.log(2), math.log(2) - entropy, entropy, variance * math.log(3) ** 2, log_mass]
    assert [getattr(found, name).item() for name in FIELDS] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("temperature", "gamma", "scale"), GRID)
def test_values_and_gradients_are_those_of_the_plain_form_in_any_panels(
    temperature: float, gamma: float, scale: float
) -> None:
    """Without a gamma, those that need none are the same, and there are no others."""
    features = random_features(4, 7)
    options: dict[str, Any] = {"teacher_logit_scale": 0.7 * scale, "temperature": temperature}
    whole = plain(features, logit_scale=scale, gamma=gamma, **options)
    for its_gamma, names in ((gamma, WITH_GRADIENT), (None, WITH_GRADIENT[:2])):

        def expected(x: Features, a: Tensor, names: Sequence[str] = names) -> Tensor:
            return weigh(plain(x, logit_scale=a, gamma=gamma, **options), names)

        wanted = [gradients(expected, features, scale, keys=keys) for keys in (False, True)]
        for tile_size in (1, 3, 50):
            compute = partial(query_statistics, gamma=its_gamma, tile_size=tile_size, **options)
            found = vars(compute(*features, logit_scale=scale))
            assert list(found) == list(FIELDS if its_gamma is not None else FIELDS[:3])
            for name, value in found.items():
                torch.testing.assert_close(value, getattr(whole, name), rtol=1e-12, atol=1e-12)

            def loss(x: Features, a: Tensor, compute: Any = compute, names: Sequence[str] = names) -> Tensor:
                return weigh(compute(*x, logit_scale=a), names)

            for keys in (False, True):
                for a, b in zip(gradients(loss, features, scale, keys=keys), wanted[keys], strict=True):
                    assert (a - b).norm() <= 1e-12 * max(1, b.norm())


@pytest.mark.parametrize("tile_size", [40, 2048])
@pytest.mark.parametrize("keys", [False, True], ids=["constant keys", "moving keys"])
def test_gradients_keep_their_digits_at_scale_100(keys: bool, tile_size: int) -> None:
    def loss(x: Features, a: Tensor) -> Tensor:
        rows: Any = query_statistics(*x, logit_scale=a, teacher_logit_scale=100.0, gamma=0.3, tile_size=tile_size)
        return rows.ce.mean() + 0.1 * rows.variance.mean()

    exact = gradients(loss, random_features(64, 96), 100.0, keys=keys)
    found = gradients(loss, random_features(64, 96, dtype=torch.float32), 100.0, keys=keys)
    for a, b in zip(found, exact, strict=True):
        assert ((a.double() - b).norm() / b.norm()).item() <= 1e-5


@pytest.mark.parametrize(("temperature", "tile_size"), [(1.0, 3), (2.0, 3), (2.0, 2048)])
@pytest.mark.parametrize("gamma", [None, 0.3])
def test_gradcheck(gamma: float | None, temperature: float, tile_size: int) -> None:
    queries, keys, *teacher = (each[:, :6].contiguous() for each in random_features(3, 5))
    options: dict[str, Any] = {"teacher_logit_scale": 4.0, "tile_size": tile_size, "temperature": temperature}

    def values(queries: Tensor, keys: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        found = vars(query_statistics(queries, keys, *teacher, logit_scale=scale, gamma=gamma, **options))
        assert {name for name, value in found.items() if value.requires_grad} == found.keys() & {*WITH_GRADIENT}
        return tuple(found[name] for name in WITH_GRADIENT if name in found)

    scale = torch.tensor(6.0, dtype=torch.float64)
    for wanted in ((True, True, True), (True, False, False), (False, False, True), (False, True, False)):
        leaves = [x.detach().requires_grad_(y) for x, y in zip((queries, keys, scale), wanted, strict=True)]
        assert torch.autograd.gradcheck(values, leaves, fast_mode=not all(wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys", [False, True])
def test_autocast_changes_nothing(dtype: torch.dtype, keys: bool) -> None:
    def loss(x: Features, a: Tensor) -> Tensor:
        return weigh(query_statistics(*x, logit_scale=a, teacher_logit_scale=90.0, gamma=1.0))

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
        (lambda x: ([x[0][:4], *x[1:]], {}), r"shapes \[\(4, 32\), .*\(5, 40\), .*need n × d"),
        (lambda x: ([x[0], x[1][:, :9], *x[2:]], {}), r"shapes \[\(5, 32\), \(7, 9\), .*need n × d"),
    ],
)
def test_wrong_arguments_are_refused(change: Callable[..., Any], words: str, unchecked_shapes: None) -> None:
    features, options = change(random_features(5, 7))
    with pytest.raises(ValueError, match=words):
        query_statistics(*features, logit_scale=1.0, teacher_logit_scale=1.0, **options)
