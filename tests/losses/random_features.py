"""Queries and keys of a student and a teacher, for tests."""

import torch
import torch.nn.functional as F
from torch import Tensor

Features = tuple[Tensor, Tensor, Tensor, Tensor]


def random_features(num_queries: int, num_keys: int, *, dtype: torch.dtype = torch.float64) -> Features:
    """Unit vectors in eight clusters, as trained features lie: at scale 100 a query's best logits are close together."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(8, 40, generator=generator, dtype=torch.float64)

    def near(count: int, width: int) -> Tensor:
        noise = torch.randn(count, width, generator=generator, dtype=torch.float64)
        # Rounded to float32, so that every dtype gets the same inputs.
        return F.normalize(centres[torch.arange(count) % 8, :width] + 0.6 * noise, dim=1).float().to(dtype)

    return near(num_queries, 32), near(num_keys, 32), near(num_queries, 40), near(num_keys, 40)
