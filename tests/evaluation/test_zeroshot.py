"""Zero-shot classification against plain loops, open_clip's own classifier and hand-made scores."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipkd.evaluation.measure import ClassScores, rank_classes
from clipkd.evaluation.zeroshot import build_classifier

CLASSNAMES = ["tabby cat", "dog", "sailing boat", "apple", "grand piano", "cat", "red {c} kite"]
TEMPLATES = ["a photo of a {c}.", "{c}", "a drawing of {c}, {c} and nothing else"]


def encode_by_letters(texts: list[str]) -> Tensor:
    """A text tower whose features follow from the text alone: unit vectors of letter counts, and the length."""
    rows = [[float(text.count(letter)) for letter in "abcdefgh"] + [float(len(text))] for text in texts]
    vectors = torch.tensor(rows, dtype=torch.float64)
    return vectors / vectors.square().sum(dim=1, keepdim=True).sqrt()


def loop_classifier(classnames: list[str], templates: list[str]) -> list[list[float]]:
    classifier = []
    for name in classnames:
        total = [0.0] * 9
        for template in templates:
            feature = encode_by_letters([name.join(template.split("{c}"))])[0].tolist()
            total = [a + b / len(templates) for a, b in zip(total, feature, strict=True)]
        length = math.sqrt(sum(value * value for value in total))
        classifier.append([value / length for value in total])
    return classifier


def test_classifier_of_two_perpendicular_prompts_by_hand() -> None:
    axes = {"x cat": [1.0, 0.0, 0.0], "y cat": [0.0, 1.0, 0.0], "x dog": [0.0, 0.0, 1.0], "y dog": [0.0, 0.6, 0.8]}
    classifier = build_classifier(
        lambda texts: torch.tensor([axes[t] for t in texts]), ["cat", "dog"], ["x {c}", "y {c}"]
    )
    half = math.sqrt(0.5)
    # dog: (0, 0.3, 0.9) has the length √0.9
    expected = torch.tensor([[half, half, 0.0], [0.0, 0.3 / math.sqrt(0.9), 0.9 / math.sqrt(0.9)]])
    torch.testing.assert_close(classifier, expected)


def test_classifier_is_the_normalised_mean_of_the_normalised_prompts_in_batches_of_any_size() -> None:
    calls: list[int] = []
    templates = [*TEMPLATES, *(f"{number} {{c}}" for number in range(80 - len(TEMPLATES)))]

    def encode(texts: list[str]) -> Tensor:
        calls.append(len(texts))
        return encode_by_letters(texts)

    names = [*CLASSNAMES, *(f"cat {number}" for number in range(27 - len(CLASSNAMES)))]
    ours = build_classifier(encode, [*names, *names], templates)
    assert calls == [12 * 80, 12 * 80, 3 * 80]  # each name once
    expected = torch.tensor(loop_classifier(names, templates), dtype=torch.float64)
    torch.testing.assert_close(ours, torch.cat([expected, expected]), rtol=0, atol=1e-12)


def rank(features: Tensor, classifier: Tensor, *, num_ranks: int = 5) -> Tensor:
    return rank_classes(torch.cat(list(ClassScores(features, classifier, 1.0).cosines())), num_ranks=num_ranks)


@pytest.mark.parametrize("num_classes", [2, 37, 1000])
@pytest.mark.parametrize("num_images", [1, 33])
def test_of_equal_classes_the_lowest_index_comes_first(num_images: int, num_classes: int) -> None:
    # One image too: the last batch of a data set may hold one, and a product with a vector is summed in another order.
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        features = F.normalize(torch.randn(num_images, 128, generator=generator), dim=1)
        distinct = F.normalize(torch.randn(num_classes // 3 + 1, 128, generator=generator), dim=1)
        copy_of = torch.randint(0, len(distinct), (num_classes,), generator=generator)
        cosines = (features.double() @ distinct.double().T).tolist()
        for row, image in zip(rank(features, distinct[copy_of]).tolist(), cosines, strict=True):
            assert row == sorted(range(num_classes), key=lambda c: (-image[copy_of[c]], c))[:5]
