"""The loss without the matrices: equal to literal loops, in memory that does not grow with their size."""

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clipkd.losses import Queue, in_panels, similarity_statistics
from tests.losses.live_bytes import LiveBytes

ROOT = Path(__file__).parents[2]
FIELDS = ("ce", "kl", "teacher_entropy", "variance", "log_weight_mass", "info_nce")


def features(*sizes: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        F.normalize(torch.randn(*size, generator=generator, dtype=torch.float64), dim=1).to(dtype) for size in sizes
    ]


def batch(pairs: int, queued: int = 0, *, seed: int = 0) -> tuple[list[Tensor], Queue | None]:
    """Pairs of width 6, the teacher's of width 5."""
    own = features((pairs, 6), (pairs, 6), (pairs, 5), (pairs, 5), seed=seed)
    if not queued:
        return own, None
    return own, Queue(*features((queued, 6), (queued, 6), (queued, 5), (queued, 5), seed=seed + 1))


def by_hand(s: list[float], u: list[float], own: int, t: float, t_w: float, gamma: float) -> dict[str, float]:
    """One row by loops over numbers, straight from the definitions."""

    def softmax(values: list[float]) -> list[float]:
        top = max(values)
        parts = [math.exp(value - top) for value in values]
        return [part / math.fsum(parts) for part in parts]

    q, pi = softmax([x / t for x in u]), softmax([x / t for x in s])
    w = [p**gamma for p in softmax([x / t_w for x in u])]
    mass = math.fsum(w)
    ce = -math.fsum(a * math.log(b) for a, b in zip(q, pi, strict=True))
    entropy = -math.fsum(a * math.log(a) for a in q if a > 0)
    pairs = itertools.product(range(len(s)), repeat=2)
    double = math.fsum(w[j] * w[k] * ((u[j] - u[k]) - (s[j] - s[k])) ** 2 for j, k in pairs)
    return {
        "ce": ce,
        "kl": ce - entropy,
        "teacher_entropy": entropy,
        "variance": double / (2 * mass**2),
        "log_weight_mass": math.log(mass),
        "info_nce": -math.log(softmax(s)[own]),
    }


GRID = list(itertools.product((1.0, 10.0, 100.0), (0.5, 1.0, 4.0), (0.5, 1.0, 4.0), (0.0, 0.05, 0.5, 1.0)))


@pytest.mark.parametrize(
    ("scale", "temperature", "weight_temperature", "gamma"), GRID, ids=["-".join(map(str, point)) for point in GRID]
)
def test_every_statistic_is_that_of_loops_over_numbers_for_every_tile_size(
    scale: float, temperature: float, weight_temperature: float, gamma: float
) -> None:
    for queued in (0, 4):
        (image, text, t_image, t_text), queue = batch(7, queued)
        found = [
            similarity_statistics(
                *(image, text, t_image, t_text),
                logit_scale=scale,
                teacher_logit_scale=0.7 * scale,
                temperature=temperature,
                weight_temperature=weight_temperature,
                gamma=gamma,
                queue=queue,
                tile_size=tile_size,
            )
            for tile_size in (1, 3, 5, 9, 100, None)
        ]
        for name, own, keys, t_own, t_keys, places in (
            ("image_to_text", image, text, t_image, t_text, (1, 3)),
            ("text_to_image", text, image, t_text, t_image, (0, 2)),
        ):
            if queue is not None:
                keys, t_keys = torch.cat([keys, queue[places[0]]]), torch.cat([t_keys, queue[places[1]]])
            for i in range(7):
                s = [scale * math.fsum((own[i] * key).tolist()) for key in keys]
                u = [0.7 * scale * math.fsum((t_own[i] * key).tolist()) for key in t_keys]
                expected = by_hand(s, u, i, temperature, weight_temperature, gamma)
                for statistics in found:
                    rows = getattr(statistics, name)
                    values = {field: getattr(rows, field)[i].item() for field in FIELDS}
                    assert values == pytest.approx(expected, rel=1e-8, abs=1e-9)


def test_doubling_every_key_adds_ln_2_to_the_cross_entropy_alone() -> None:
    own, _ = batch(7)
    options: dict[str, Any] = {"logit_scale": 9.0, "teacher_logit_scale": 7.0, "gamma": 0.4, "tile_size": 4}
    once, twice = (similarity_statistics(*own, **options, queue=queue) for queue in (None, Queue(*own)))
    for way in ("image_to_text", "text_to_image"):
        before, after = getattr(once, way), getattr(twice, way)
        for name in FIELDS:
            more = {"ce": math.log(2), "teacher_entropy": math.log(2), "info_nce": math.log(2)}.get(name, 0.0)
            more = math.log(2) * (1 - 0.4) if name == "log_weight_mass" else more
            torch.testing.assert_close(getattr(after, name), getattr(before, name) + more)


def test_directions_and_orders_may_be_exchanged() -> None:
    (image, text, t_image, t_text), _ = batch(9)
    options: dict[str, Any] = {"logit_scale": 9.0, "teacher_logit_scale": 7.0, "gamma": 0.4, "tile_size": 4}
    found = similarity_statistics(image, text, t_image, t_text, **options)
    swapped = similarity_statistics(text, image, t_text, t_image, **options)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    moved = similarity_statistics(image[order], text[order], t_image[order], t_text[order], **options)
    for name in FIELDS:
        torch.testing.assert_close(getattr(swapped.text_to_image, name), getattr(found.image_to_text, name))
        torch.testing.assert_close(getattr(moved.text_to_image, name), getattr(found.text_to_image, name)[order])


def total(found: object, weights: Tensor) -> Tensor:
    """Every statistic of every query with a weight of its own: upstream gradients that differ."""
    values = [getattr(getattr(found, way), field) for way in ("image_to_text", "text_to_image") for field in FIELDS]
    return (torch.stack(values) * weights[:, : values[0].shape[0]]).sum()


def gradients(tile_size: int | None, *, dtype: torch.dtype = torch.float64, twice: bool = False) -> list[Tensor]:
    own, queue = batch(11, 6)
    leaves = [each.to(dtype) for each in own]
    for leaf in leaves[:2]:  # the teacher's are constants
        leaf.requires_grad_()
    scale = torch.tensor(8.0, dtype=dtype, requires_grad=True)
    queue = None if queue is None else Queue(*(each.to(dtype) for each in queue))
    found = similarity_statistics(
        *leaves,
        logit_scale=scale,
        teacher_logit_scale=5.0,
        gamma=0.4,
        temperature=1.5,
        queue=queue,
        tile_size=tile_size,
    )
    weights = torch.rand(12, 11, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    loss = total(found, weights)
    first = torch.autograd.grad(loss, [*leaves[:2], scale], retain_graph=twice)
    if twice:
        second = torch.autograd.grad(loss, [*leaves[:2], scale])
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return list(first)


@pytest.mark.parametrize("tile_size", [1, 3, 6, 10])
def test_gradients_are_those_of_the_whole_matrix(tile_size: int) -> None:
    for found, expected in zip(gradients(tile_size, twice=True), gradients(1000), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for found, expected in zip(gradients(tile_size, dtype=torch.float32), gradients(1000), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_gradcheck() -> None:
    (image, text, t_image, t_text), queue = batch(4, 3)

    def value(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        found = similarity_statistics(
            *(image, text, t_image, t_text),
            logit_scale=scale,
            teacher_logit_scale=4.0,
            gamma=0.3,
            queue=queue,
            tile_size=3,
        )
        return total(found, torch.linspace(0.5, 2, 48, dtype=torch.float64).view(12, 4))

    inputs = (image.requires_grad_(), text.requires_grad_(), torch.tensor(6.0, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(value, inputs)


def clustered(pairs: int, queued: int) -> tuple[list[Tensor], Queue]:
    """As trained features lie: at scale 100 a query's best logits are close together and far above the others."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(8, 40, generator=generator, dtype=torch.float64)

    def near(width: int) -> Tensor:
        noise = torch.randn(pairs + queued, width, generator=generator, dtype=torch.float64)
        return F.normalize(centres[torch.arange(pairs + queued) % 8, :width] + 0.6 * noise, dim=1)

    both = [near(width) for width in (32, 32, 40, 40)]
    return [each[:pairs] for each in both], Queue(*(each[pairs:] for each in both))


@pytest.mark.parametrize(
    ("dtype", "matmul_dtype", "tolerance"),
    [(torch.float32, None, 1e-5), (torch.float32, torch.float16, 3e-3), (torch.float64, torch.float32, 1e-5)],
    ids=str,
)
def test_gradients_keep_their_digits_at_scale_100(
    dtype: torch.dtype, matmul_dtype: torch.dtype | None, tolerance: float
) -> None:
    def gradients(dtype: torch.dtype, **options: Any) -> list[Tensor]:
        own, queue = clustered(64, 32)
        rounded = [each.float().to(dtype) for each in own]  # the same inputs for all
        leaves = [each.requires_grad_() for each in (*rounded[:2], torch.tensor(100.0, dtype=dtype))]
        found = similarity_statistics(
            *(leaves[0], leaves[1], *rounded[2:]),
            logit_scale=leaves[2],
            teacher_logit_scale=100.0,
            gamma=0.3,
            queue=Queue(*(each.float().to(dtype) for each in queue)),
            tile_size=20,
            **options,
        )
        ways = (found.image_to_text, found.text_to_image)
        loss = sum(way.ce.mean() + 0.1 * way.variance.mean() + way.info_nce.mean() for way in ways)
        assert isinstance(loss, Tensor)
        return list(torch.autograd.grad(loss, leaves))

    expected = gradients(torch.float64)
    for found, exact in zip(gradients(dtype, matmul_dtype=matmul_dtype), expected, strict=True):
        assert ((found.double() - exact).norm() / exact.norm()).item() <= tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    results = []
    for enabled in (False, True):
        own = [each.float() for each in clustered(32, 0)[0]]
        leaves = [each.requires_grad_() for each in own[:2]]
        with torch.autocast("cpu", dtype, enabled=enabled):
            found = similarity_statistics(*own, logit_scale=100.0, teacher_logit_scale=100.0, tile_size=20)
            value = total(found, torch.ones(12, 32))
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiled_tiles_and_terms_give_the_same_numbers() -> None:
    """In a process of its own: the compiler does not see through this suite's checks of shapes."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.losses.compiled"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 7
    assert max(errors.values()) <= 1e-10, errors


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[override]
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return out


def measure(pairs: int, queued: int, tile_size: int) -> tuple[int, int]:
    """Elements of the largest tensor, forward and backward, and bytes that the graph keeps beyond the inputs."""
    own, queue = batch(pairs, queued)
    leaves = [each.requires_grad_() for each in own]
    inputs = {each.untyped_storage().data_ptr() for each in (*leaves, *(queue or ()))}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found = similarity_statistics(
                *leaves, logit_scale=9.0, teacher_logit_scale=9.0, queue=queue, tile_size=tile_size
            )
        total(found, torch.ones(12, pairs, dtype=torch.float64)).backward()
    return largest.elements, sum(kept.values())


def test_memory_grows_with_the_rows_not_with_the_matrix() -> None:
    tile = 64
    sizes = {pairs: measure(pairs, pairs // 2, tile) for pairs in (128, 256, 512)}
    for pairs, (largest, kept) in sizes.items():
        keys = pairs + pairs // 2
        assert largest <= max(tile**2, 12 * pairs, 6 * keys)
        assert largest < pairs * keys / 4
        assert kept < 8 * 40 * keys  # float64, a few vectors per key
    assert sizes[512][1] <= 5 * sizes[128][1]
    largest, kept = measure(256, 128, 10_000)
    assert largest == 256**2, "one tile, for which this measure would be none otherwise"
    assert kept < 8 * 40 * 384


def test_nothing_is_kept_or_computed_twice_without_gradients() -> None:
    calls: list[int] = []

    def compute(rows: Tensor) -> dict[str, Tensor]:
        calls.append(len(rows))
        return {"sum": rows.square().sum(dim=1)}

    matrix = torch.arange(40.0).view(10, 4)
    with torch.no_grad():
        found = in_panels(compute, matrix.split(4))
    assert calls == [4, 4, 2]
    assert found["sum"].tolist() == matrix.square().sum(dim=1).tolist()
    assert not found["sum"].requires_grad
    calls.clear()
    matrix.requires_grad_()
    in_panels(compute, matrix.split(4))["sum"].sum().backward()
    assert len(calls) == 6  # once forward, once for the gradient
    assert torch.equal(matrix.grad, 2 * matrix.detach())  # type: ignore[arg-type]
    calls.clear()
    in_panels(compute, [matrix])["sum"].sum().backward()
    assert calls == [10]  # one panel is the plain form


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: ({"tile_size": 0}, a), "tile_size is 0"),
        (lambda a: ({"gamma": -1.0}, a), "gamma is -1.0"),
        (lambda a: ({}, [a[0][:5], *a[1:]]), "image 5, text 7, teacher_image 7, teacher_text 7 differ"),
        (lambda a: ({}, [a[0][:, :4], *a[1:]]), r"image and text, of batch and queue, are \[4, 6\] wide"),
        (lambda a: ({}, [a[0].long(), *a[1:]]), "image is no matrix of floating-point features"),
        (lambda a: ({"matmul_dtype": torch.bfloat16}, a), "matmul_dtype is torch.bfloat16"),
        (lambda a: ({"queue": Queue(*a)._replace(text=a[1][:3])}, a), r"queue.image 7, text 3"),
        (lambda a: ({"queue": Queue(a[0], a[1], a[0], a[1])}, a), r"teacher_image and teacher_text.* \[5, 6\] wide"),
    ],
)
def test_wrong_arguments_are_refused(change: Callable, words: str, unchecked_shapes: None) -> None:
    own, _ = batch(7)
    options, arguments = change(own)
    with pytest.raises(ValueError, match=words):
        similarity_statistics(*arguments, logit_scale=1.0, teacher_logit_scale=1.0, **options)


@pytest.mark.slow
def test_16k_queries_and_32k_keys_take_less_than_3_gb() -> None:
    """Whole, each of a dozen matrices would take 2.1 GB. Two minutes on two cores."""
    generator = torch.Generator().manual_seed(0)
    pairs, total = 16_384, 32_768
    centres = torch.randn(total // 8, 768, generator=generator)

    def near(width: int) -> Tensor:
        noise = torch.randn(total, width, generator=generator)
        return F.normalize(centres[torch.arange(total) % len(centres), :width] + 1.2 * noise, dim=1)

    rings = [near(width) for width in (512, 512, 768, 768)]
    own, queue = [ring[:pairs].clone() for ring in rings], Queue(*(ring[pairs:] for ring in rings))
    leaves = [each.requires_grad_() for each in (*own[:2], torch.tensor(100.0))]
    with LiveBytes() as live:
        found = similarity_statistics(*own, logit_scale=leaves[2], teacher_logit_scale=100.0, gamma=0.3, queue=queue)
        ways = found.image_to_text, found.text_to_image
        loss = torch.stack([way.ce.mean() + 0.1 * way.variance.mean() for way in ways]).sum()
        gradients = torch.autograd.grad(loss, leaves)
    assert live.peak < 3e9
    assert all(gradient.isfinite().all() for gradient in gradients)
    rows = torch.randperm(pairs, generator=generator)[:16]
    for number, way in enumerate(ways):
        s, u = (
            100 * own[place + number][rows].double().detach() @ rings[place + 1 - number].double().T for place in (0, 2)
        )
        q, weight, difference = u.softmax(dim=1), (0.3 * u).softmax(dim=1), u - s
        centred = difference - (weight * difference).sum(dim=1, keepdim=True)
        expected = {
            "ce": -(q * s.log_softmax(dim=1)).sum(dim=1),
            "teacher_entropy": -(q * u.log_softmax(dim=1)).sum(dim=1),
            "variance": (weight * centred.square()).sum(dim=1),
            "info_nce": s.logsumexp(dim=1) - s[torch.arange(16), rows],
        }
        for name, exact in expected.items():
            torch.testing.assert_close(getattr(way, name)[rows].double(), exact, rtol=1e-5, atol=1e-5)
