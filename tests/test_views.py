"""Batches of pixels and tokens → every model's view, with shared tensors for equal inputs."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from clipkd.data.loader import Collate, Sample
from clipkd.views import Batch, View, Views, ViewSpec
from tests.data.samples import tokenize, view_spec


def shifted(spec: ViewSpec) -> ViewSpec:
    """With another tokenizer, whose tokens are 1000 larger."""
    return replace(spec, tokenizer_name="shifted", tokenize=lambda texts: tokenize(texts) + 1000)


def sample(views: Views, number: int) -> Sample:
    """Different values for every view, pixel and channel."""
    rng = np.random.default_rng(number)
    pixels = [rng.integers(0, 256, (*spec.size, 3), dtype=np.uint8) for spec in views.pixel_specs]
    return Sample(pixels, f"a{number:02}", 0, 10 + number, -number, f"key {number}")


def collate(*specs: ViewSpec, num_samples: int = 4) -> tuple[Batch, list[View], Views]:
    views = Views(specs)
    batch = Collate(views)([sample(views, number) for number in range(num_samples)])
    return batch, views.of(batch), views


def test_pixels_are_normalised_per_channel_by_hand() -> None:
    spec = replace(view_spec(1), mean=(0.5, 0.0, 0.25), std=(0.5, 2.0, 0.25))
    pixels = torch.tensor([[255, 51, 0], [0, 0, 255]], dtype=torch.uint8).view(2, 3, 1, 1)
    images = spec.normalize(pixels)
    expected = torch.tensor([[1.0, 0.1, -1.0], [-1.0, 0.0, 3.0]]).view(2, 3, 1, 1)
    torch.testing.assert_close(images, expected)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    assert pixels.flatten().tolist() == [255, 51, 0, 0, 0, 255]  # the batch is unchanged


def test_a_batch_holds_bytes_ids_labels_and_keys_in_the_samples_order() -> None:
    batch, _, views = collate(view_spec(3), view_spec(5))
    assert {part.dtype for part in batch.pixels} == {torch.uint8}
    assert all(part.is_contiguous() for part in batch.pixels)
    assert batch.ids.tolist() == [10, 11, 12, 13]
    assert batch.labels.tolist() == [0, -1, -2, -3]
    assert batch.keys == ("key 0", "key 1", "key 2", "key 3")
    assert batch.texts[0].tolist() == [[97, 48, 48 + number, 32] for number in range(4)]  # "a00 ", "a01 ", …
    assert (batch.skipped, batch.place) == ((), None)
    for kind, part in enumerate(batch.pixels):
        for number, image in enumerate(part):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), sample(views, number).pixels[kind])


@pytest.mark.parametrize(
    ("other", "shared"),
    [
        (view_spec(8), "pixels texts"),
        (view_spec(9), "texts"),
        (replace(view_spec(8), interpolation="bicubic"), "texts"),
        (view_spec(8, mean=0.1), "pixels texts"),
        (view_spec(8, std=0.5), "pixels texts"),
        (shifted(view_spec(8)), "pixels"),
    ],
    ids=["equal", "size", "interpolation", "mean", "std", "tokenizer"],
)
def test_models_share_exactly_their_equal_inputs(other: ViewSpec, shared: str) -> None:
    batch, (student, teacher), _ = collate(view_spec(8), other)
    assert len(batch.pixels) == (1 if "pixels" in shared else 2)
    assert len(batch.texts) == (1 if "texts" in shared else 2)
    assert (teacher.images is student.images) == ("pixels" in shared)
    assert (teacher.texts is student.texts) == ("texts" in shared)


@pytest.mark.parametrize("order", [(0,), (0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1, 0)])
def test_every_model_gets_its_own_view_for_any_order_of_models(order: Sequence[int]) -> None:
    """The student and one teacher agree in pixels, one teacher and another in tokens."""
    specs = [view_spec(8), shifted(view_spec(12, mean=0.5)), shifted(view_spec(8, std=0.5))]
    _, seen, views = collate(*[specs[number] for number in order])
    kinds = [spec.pixels for spec in views.pixel_specs]
    for number, view in zip(order, seen, strict=True):
        spec = specs[number]
        pixels = np.stack([sample(views, n).pixels[kinds.index(spec.pixels)] for n in range(4)]).transpose(0, 3, 1, 2)
        expected = torch.from_numpy((pixels / 255 - spec.mean[0]) / spec.std[0]).float()
        torch.testing.assert_close(spec.normalize(view.images), expected, atol=1e-5, rtol=0)
        assert view.texts.tolist() == spec.tokenize([f"a{n:02}" for n in range(4)]).tolist()
