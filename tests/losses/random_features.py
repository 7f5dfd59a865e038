"""Features of a student and a teacher, and logits, for tests of losses."""

import torch
import torch.nn.functional as F
from torch import Tensor

Features = tuple[Tensor, Tensor, Tensor, Tensor]
SCALES = (1.0, 10.0, 100.0)
TEMPERATURES = (0.5, 1.0, 4.0)
GAMMAS = (0.0, 0.05, 0.5, 1.0)
GRID = [(TEMPERATURES[(i + j) % 3], gamma, scale) for i, gamma in enumerate(GAMMAS) for j, scale in enumerate(SCALES)]
"""Temperature, gamma and scale: every two values of two of them meet."""


def random_features(num_queries: int, num_keys: int, *, dtype: torch.dtype = torch.float64) -> Features:
    """Unit vectors in eight clusters, as trained features lie: at scale 100 a query's best logits are close together."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(8, 40, generator=generator, dtype=torch.float64)

    def near(count: int, width: int) -> Tensor:
        noise = torch.randn(count, width, generator=generator, dtype=torch.float64)
        # Rounded to float32, so that every dtype gets the same inputs.
        return F.normalize(centres[torch.arange(count) % 8, :width] + 0.6 * noise, dim=1).float().to(dtype)

    return near(num_queries, 32), near(num_keys, 32), near(num_queries, 40), near(num_keys, 40)


def random_logits(count: int, rows: int = 3, candidates: int = 4, *, scale: float, seed: int) -> list[Tensor]:
    """`count` matrices of random cosines times the scale."""
    generator = torch.Generator().manual_seed(seed)
    return list(scale * (2 * torch.rand(count, rows, candidates, generator=generator, dtype=torch.float64) - 1))


def unit_vectors(count: int, *, seed: int) -> list[Tensor]:
    """`count` times 6 unit vectors of width 5."""
    generator = torch.Generator().manual_seed(seed)
    return list(F.normalize(torch.randn(count, 6, 5, generator=generator, dtype=torch.float64), dim=-1))


def clustered_logits(seed: int, *, spread: float = 0.3) -> Tensor:
    """100 times the cosines of a trained model's kind: 64 pairs in 8 groups, with a gap between the modalities; float32."""
    generator = torch.Generator().manual_seed(seed)
    centres, meanings, *noise = (
        F.normalize(torch.randn(n, 128, generator=generator), dim=1) for n in (8, 64, 64, 64, 1)
    )
    pairs, gap = F.normalize(centres.repeat(8, 1) + spread * meanings, dim=1), 0.5 * noise[2]
    image = F.normalize(pairs + gap + 0.1 * noise[0], dim=1)
    return 100 * image @ F.normalize(pairs - gap + 0.1 * noise[1], dim=1).T
