"""Panels of queries: the results and gradients of all rows at once; and the compiled forms of what is done to logits."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from clipkd.losses import in_panels, panel_height
from clipkd.losses.panels import default_tile_size

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def test_panels_are_computed_once_and_again_for_their_gradient() -> None:
    calls: list[int] = []
    matrix, factor = torch.arange(40.0).view(10, 4), torch.tensor(2.0)

    def compute(rows: Tensor, own: Tensor) -> dict[str, Tensor]:
        calls.append(len(rows))
        return {"sum": (factor * rows.square()).sum(dim=1) + own}

    rows, expected = (matrix, torch.arange(10.0)), 2 * matrix.square().sum(dim=1) + torch.arange(10.0)
    with torch.no_grad():
        found = in_panels(compute, rows, height=4)
    assert calls == [4, 4, 2]
    assert torch.equal(found["sum"], expected)
    assert not found["sum"].requires_grad
    calls.clear()
    for leaf in (matrix, factor):
        leaf.requires_grad_()
    in_panels(compute, rows, height=4)["sum"].sum().backward()
    assert sorted(calls) == [2, 2, 4, 4, 4, 4]
    assert torch.equal(matrix.grad, 4 * matrix.detach())  # type: ignore[arg-type]
    assert factor.grad == matrix.detach().square().sum()
    calls.clear()
    in_panels(compute, rows, height=10)["sum"].sum().backward()
    assert calls == [10]  # one panel is the plain form


def test_a_panel_has_at_most_a_tile_of_logits_but_at_least_a_row() -> None:
    assert [panel_height(columns, CPU, 10) for columns in (1, 30, 100, 101)] == [100, 3, 1, 1]
    assert panel_height(4096, CPU) == 1024
    with pytest.raises(ValueError, match="tile_size is 0"):
        panel_height(10, CPU, 0)


@pytest.mark.parametrize(
    ("gigabytes", "tile_size"), [(8, 2048), (16, 4096), (24, 4096), (40, 4096), (80, 8192), (141, 8192)]
)
def test_a_tile_on_a_gpu_follows_its_memory(gigabytes: int, tile_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    total = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: total)
    default_tile_size.cache_clear()
    assert panel_height(2048, torch.device("cuda:0")) == tile_size**2 // 2048
    assert panel_height(2048, torch.device("cuda:0"), 1024) == 512  # what is set holds
    default_tile_size.cache_clear()


@pytest.mark.slow
def test_compiled_panels_and_terms_give_the_same_numbers() -> None:
    """In a subprocess: the compiler does not see through this suite's checks of shapes. Three minutes."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.losses.compiled"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 10
    assert max(errors.values()) <= 1e-10, errors
