"""`query_statistics` does no more work and keeps no more memory than it promises."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clipkd.losses import query_statistics, row_statistics
from tests.losses.live_bytes import LiveBytes
from tests.losses.random_features import random_features


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[override]
        self.count += function is torch.ops.aten.mm.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("gamma", "keys", "forward", "backward"), [(None, False, 3, 0), (None, True, 2, 4), (1.0, False, 4, 0)]
)
def test_constant_keys_cost_a_product_per_panel_and_statistic_and_no_gradient_two(
    gamma: float | None, keys: bool, forward: int, backward: int
) -> None:
    features = random_features(12, 9)
    queries = features[0].requires_grad_()
    options: dict[str, Any] = {"logit_scale": 9.0, "teacher_logit_scale": 7.0, "tile_size": 6, "gamma": gamma}
    features[1].requires_grad_(keys)
    with Products() as products:
        loss = query_statistics(*features, **options).ce.sum()
    assert products.count == 3 * forward  # three panels of four rows
    with Products() as products:
        first = torch.autograd.grad(loss, queries, retain_graph=True)
    assert products.count == 3 * backward
    assert torch.equal(torch.autograd.grad(loss, queries)[0], first[0]), "a second backward pass"
    with Products() as products, torch.no_grad():
        assert not query_statistics(*features, **options).ce.requires_grad
    assert products.count == 3 * 2


def measure(
    num_queries: int, num_keys: int, *, keys: bool, gamma: float | None, tile_size: int = 64
) -> tuple[int, int]:
    """Bytes alive at the peak, forward and backward, and bytes kept for the backward pass beside the inputs."""
    features = random_features(num_queries, num_keys)
    for leaf in features[: 1 + keys]:
        leaf.requires_grad_()
    inputs, kept = {each.data_ptr() for each in features}, dict[int, int]()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in inputs:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    options: dict[str, Any] = {"logit_scale": 9.0, "teacher_logit_scale": 9.0, "tile_size": tile_size, "gamma": gamma}
    with LiveBytes() as live:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            rows: Any = query_statistics(*features, **options)
            loss = (rows.ce if gamma is None else rows.ce + rows.variance).sum()
        loss.backward()
    return live.peak, sum(kept.values())


@pytest.mark.parametrize(("gamma", "statistics"), [(None, 1), (0.3, 2)])
@pytest.mark.parametrize("keys", [False, True], ids=["constant keys", "moving keys"])
def test_memory_is_linear_in_the_queries(keys: bool, gamma: float | None, statistics: int) -> None:
    width, tile = 32, 8 * 64**2
    for n, m in ((128, 192), (256, 384), (512, 768)):
        peak, kept = measure(n, m, keys=keys, gamma=gamma)
        assert peak <= (3 + 2 * statistics) * tile + 8 * width * (8 * n + 3 * m)
        assert kept <= 8 * n * (statistics * width + 1)  # a vector per statistic and query
    whole, kept = measure(512, 768, keys=keys, gamma=gamma, tile_size=10_000)
    assert whole > 5 * 8 * 512 * 768, "one panel, for which this measure shows the matrices"
    assert kept <= 8 * 512 * (768 * statistics + 1)


@pytest.mark.slow
def test_16k_queries_and_32k_keys_take_less_than_3_gb() -> None:
    """Two calls, as for both directions, on teacher keys. A single matrix of logits takes 2.1 GB. Half a minute on one core."""
    n, m = 16_384, 32_768
    image, _, text, keys = random_features(n, m, dtype=torch.float32)
    teacher = F.pad(image, (0, 8))
    leaves = [text.clone().requires_grad_(), torch.tensor(100.0, requires_grad=True)]
    options: dict[str, Any] = {"logit_scale": leaves[1], "teacher_logit_scale": 100.0, "gamma": 0.3}
    with LiveBytes() as live:
        rows: list[Any] = [query_statistics(leaves[0], keys, own, keys, **options) for own in (text, teacher)]
        loss = torch.stack([each.ce.mean() + 0.1 * each.variance.mean() for each in rows]).sum()
        found = torch.autograd.grad(loss, leaves)
    assert live.peak < 3e9
    assert all(each.isfinite().all() for each in found)
    some = torch.arange(0, n, 1_024)
    exact = row_statistics(*(100.0 * each[some].double() @ keys.double().T for each in (text, teacher)), gamma=0.3)
    for name in vars(exact):
        torch.testing.assert_close(getattr(rows[1], name)[some].double(), getattr(exact, name), rtol=1e-5, atol=1e-5)
