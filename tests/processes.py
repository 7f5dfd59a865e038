"""Programs of these tests on two real processes, with a rule of NCCL that gloo does not have: tensors must be contiguous."""

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from clipkd import distributed

COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all_single", "broadcast"),
    *("gather", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter"),
)


def run_two(program: str, folder: Path) -> None:
    """`python PROGRAM RANK FOLDER` for ranks 0 and 1, both of which must succeed."""
    running = []
    for rank in range(2):
        # Strings hash differently in each process, as they do under torchrun: no collective may depend on their order.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": str(3 * rank)}
        with (folder / f"{rank}.log").open("w") as log:
            running.append(subprocess.Popen([sys.executable, program, str(rank), folder], stderr=log, env=environment))
    try:
        codes = [process.wait(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert codes == [0, 0], "".join((folder / f"{rank}.log").read_text() for rank in range(2))


@contextlib.contextmanager
def joined(rank: int, folder: Path) -> Iterator[None]:
    """Within it, the two processes of `run_two` are connected."""
    torch.set_num_threads(1)
    enforce_contiguity()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    yield
    distributed.barrier()
    dist.destroy_process_group()


def enforce_contiguity() -> None:
    """Replace the collectives of this process: with a tensor that is not contiguous they raise ValueError in NCCL's words."""
    for name in COLLECTIVES:
        setattr(dist, name, checked(getattr(dist, name)))


def checked(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if not all(tensor.is_contiguous() for tensor in tensors):
            raise ValueError(f"{collective.__name__}: Tensors must be contiguous")
        return collective(*args, **kwargs)

    return call
