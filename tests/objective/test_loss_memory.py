"""What a run says of its loss's memory, against every byte that its tensors take."""

import dataclasses

import pytest
import torch

from clipkd.objective.loss_memory import measure_loss_memory
from tests.losses.live_bytes import LiveBytes
from tests.objective.tiny_clip import OBJECTIVES, TEACHER_WIDTH, make_batch, make_distiller, needs, take_loss


@pytest.mark.parametrize("tile_size", [10_000, 150])
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "features alone"])
def test_the_memory_that_is_announced_is_the_memory_it_takes(name: str, tile_size: int) -> None:
    """Within a third; whole, and in panels of 75 of 300 queries, where student keys share tiles and take half of it."""
    distiller = make_distiller(dataclasses.replace(OBJECTIVES[name], tile_size=tile_size), dtype=torch.float32)
    dims = [TEACHER_WIDTH, 4] if name == "two teachers" else [TEACHER_WIDTH]
    announced = measure_loss_memory(distiller, dims, batch_size=300)
    assert (announced.panel_height < 300) == (tile_size == 150)
    view, targets = make_batch(dtype=torch.float32, num=300)
    targets = needs(name, targets)
    for _ in range(2):  # the second time with a full queue; all ramps are over
        with LiveBytes() as live:
            take_loss(distiller, view, targets, 10)[0].backward()
        distiller.finish_step()
    rows = min(300, announced.panel_height)
    logits = rows * announced.num_candidates
    # Features, vectors per query and gradients of keys are not the logits' memory.
    beside = 300 * 4 * 150
    assert live.peak > 2 * logits * 4
    assert live.peak - beside <= 1.34 * announced.num_bytes(rows)
    shares = name == "gkl on student keys" and tile_size == 150
    assert live.peak >= (0.5 if shares else 0.66) * announced.num_bytes(rows)


def test_features_alone_form_no_logits() -> None:
    distiller = make_distiller(OBJECTIVES["features alone"], dtype=torch.float32)
    announced = measure_loss_memory(distiller, [TEACHER_WIDTH], batch_size=300)
    assert announced.kept_per_query == 0


def test_it_is_said_in_words() -> None:
    objective = dataclasses.replace(OBJECTIVES["queued"], tile_size=64)
    distiller = make_distiller(objective, dtype=torch.float32)
    announced = measure_loss_memory(distiller, [TEACHER_WIDTH], batch_size=1024)
    assert announced.describe().startswith("1,024 × 1,043 logits, 3 rows at a time, about 0.")
    assert announced.describe().endswith(" MiB at once; objective.tile_size)")
    # What was measured leaves nothing behind.
    assert distiller.num_pairs is None
    assert distiller.queue is not None
    assert len(distiller.queue) == 0
    assert distiller.pending == {}
