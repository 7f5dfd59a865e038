"""InfoNCE and the feature loss on numbers made by hand and against loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from clipkd.losses import feature_mse, info_nce


def test_info_nce_of_two_pairs_by_hand() -> None:
    logits = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]])
    # softmax (3/4, 1/4) in both rows
    assert info_nce(logits, torch.tensor([0, 1])).item() == pytest.approx(math.log(4 / 3), rel=1e-6)
    assert info_nce(logits, torch.tensor([1, 0])).item() == pytest.approx(math.log(4), rel=1e-6)
    assert info_nce(logits, torch.tensor([0, 0])).item() == pytest.approx(math.log(16 / 3) / 2, rel=1e-6)


def test_info_nce_of_indistinct_candidates_is_the_logarithm_of_their_number() -> None:
    assert info_nce(torch.full((3, 8), 17.0), torch.tensor([0, 3, 7])).item() == pytest.approx(math.log(8), rel=1e-6)


def test_info_nce_equals_a_loop_over_queries_with_more_candidates_than_queries() -> None:
    logits = 10 * torch.randn(4, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    positives = [8, 0, 3, 4]
    expected = 0.0
    for row, positive in zip(logits.tolist(), positives, strict=True):
        expected += math.log(math.fsum(math.exp(value) for value in row)) - row[positive]
    assert info_nce(logits, torch.tensor(positives)).item() == pytest.approx(expected / 4, rel=1e-12)


def test_info_nce_gradient_is_softmax_minus_one_hot() -> None:
    logits = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]], requires_grad=True)
    info_nce(logits, torch.tensor([0, 1])).backward()
    expected = torch.tensor([[-0.25, 0.25], [0.25, -0.25]]) / 2
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_info_nce_of_half_precision_logits_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits = (30 * torch.randn(4, 4, generator=torch.Generator().manual_seed(2))).to(dtype)
    value = info_nce(logits, torch.arange(4))
    assert value.dtype == torch.float32
    assert value.item() == info_nce(logits.float(), torch.arange(4)).item()


def test_feature_error_of_orthogonal_and_opposite_unit_vectors_by_hand() -> None:
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert feature_mse(one, other).item() == 1.0  # (1² + 1²) / 2
    assert feature_mse(one, -one).item() == 2.0  # 2² / 2
    assert feature_mse(one, one).item() == 0.0


def test_feature_error_of_unit_vectors_is_two_times_one_minus_cosine_over_the_width() -> None:
    generator = torch.Generator().manual_seed(3)
    student = F.normalize(torch.randn(7, 12, generator=generator, dtype=torch.float64), dim=1)
    teacher = F.normalize(torch.randn(7, 12, generator=generator, dtype=torch.float64), dim=1)
    expected = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        cosine = sum(a * b for a, b in zip(s, t, strict=True))
        expected += 2 * (1 - cosine) / 12 / 7
    assert feature_mse(student, teacher).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("shape", [(2, 5), (1, 4), (2, 1)])
def test_features_of_other_shapes_are_refused_with_the_remedy(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"\(2, 4\).*project the student's"):
        feature_mse(torch.zeros(2, 4), torch.zeros(shape))
