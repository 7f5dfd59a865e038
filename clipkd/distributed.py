"""The only calls to torch.distributed. On one process every collective is the identity."""

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, PartialState
from accelerate.utils import DynamoBackend, parse_flag_from_env
from jaxtyping import Float, Shaped
from torch import Tensor

T = TypeVar("T")

TIMEOUT = timedelta(hours=1)
"""Longest wait for another process in a collective.

NCCL's default of 10 minutes is too short while one process indexes shards, encodes a cache's shard or saves to a slow disk.
"""


def join_processes() -> PartialState:
    """Connect the processes that a launcher started, and find this process's device.

    The first call fixes timeout and backend for every later Accelerator.
    """
    # PartialState alone ignores ACCELERATE_USE_CPU and a lack of GPUs: each process would run as if it were the only one.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # fp32 means fp32: cuDNN's convolutions would use TF32 by default, and NVIDIA's containers set it for products.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    state = PartialState(cpu=on_cpu, **process_group_options(on_cpu=on_cpu))
    if state.device is not None and state.device.type == "cuda" and state.device.index is not None:
        # Of tasks that see one GPU each Accelerate takes the right one, but would give DDP the number of the task.
        state.local_process_index = state.device.index
    return state


def process_group_options(*, on_cpu: bool) -> dict[str, Any]:
    """Timeout and backend of the process group; empty for a single process.

    On GPUs tensors use NCCL and Python objects gloo, which needs no device memory and waits without occupying the GPU.
    """
    if int(os.environ.get("LOCAL_RANK", -1)) < 0:
        return {}
    on_gpu = torch.cuda.is_available() and not on_cpu
    return {"timeout": TIMEOUT} | ({"backend": "cpu:gloo,cuda:nccl"} if on_gpu else {})


def make_accelerator(precision: str, *, trackers: Sequence[str] = (), folder: str | None = None) -> Accelerator:
    """Set up Accelerate for DDP. precision: auto, fp32, bf16 or fp16.

    Raises: ValueError if Accelerate's own settings contradict the configuration.
    """
    device = join_processes().device
    if device is not None and device.type not in ("cpu", "cuda"):
        raise ValueError(f"clipkd trains on CPUs and NVIDIA GPUs, not on {device.type}; set ACCELERATE_USE_CPU=true")
    accelerator = Accelerator(
        mixed_precision=resolve_precision(precision, device),
        log_with=list(trackers) or None,
        project_dir=folder,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            "Accelerate is set to accumulate gradients, which loses negatives; unset it (accelerate config) and set "
            "micro_batches"
        )
    dynamo = accelerator.state.dynamo_plugin
    if dynamo is not None and dynamo.backend != DynamoBackend.NO:
        raise ValueError(
            "Accelerate is set to compile the model (dynamo), which passes over part of a step; unset it (accelerate config) "
            "and set objective.compile"
        )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ValueError(
            f"clipkd trains with DDP, Accelerate is set to {accelerator.distributed_type}; see accelerate config"
        )
    return accelerator


def resolve_precision(precision: str, device: torch.device | None) -> str:
    """Accelerate's name for the configured precision on this process's device.

    Raises: ValueError for fp16 on a CPU, or if Accelerate is set to another precision.
    """
    on_gpu = device is not None and device.type == "cuda"
    theirs = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # accelerate launch sets no where nobody has chosen
    if theirs not in ("no", *(("bf16", "fp16") if precision == "auto" else (precision,))):
        raise ValueError(
            f"Accelerate is set to mixed precision {theirs}, precision is {precision}; set one of them, or both alike "
            "(fp32, bf16 or fp16)"
        )
    if precision == "auto" and theirs == "no":
        return "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    precision = theirs if precision == "auto" else precision
    if precision == "fp16" and not on_gpu:
        raise ValueError("precision is fp16, which needs a GPU; use fp32 or bf16")
    return "no" if precision == "fp32" else precision


def is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    return dist.get_world_size() if is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if is_initialized() else 0


def barrier() -> None:
    if is_initialized():
        dist.barrier()


class _GatherRows(torch.autograd.Function):
    """All-gather whose backward sums the gradients that all processes have for this process's rows."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:  # type: ignore[override]
        return gather_constant(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return sum_of_own_rows(gradient)


def gather(rows: Float[Tensor, "b d"]) -> Float[Tensor, "B d"]:
    """Rows of all processes in rank order, with the exact gradient.

    If each process takes the mean loss over its queries and DDP averages over processes, parameters get the gradient of
    the mean over all queries. Every process must pass the same number of rows.
    """
    return rows if world_size() == 1 else _GatherRows.apply(rows)  # type: ignore[return-value]


def sum_of_own_rows(rows: Float[Tensor, "B *rest"]) -> Float[Tensor, "b *rest"]:
    """Sum over processes of the part that belongs to this process's rows (reduce-scatter)."""
    if world_size() == 1:
        return rows
    own = rows.new_empty(len(rows) // world_size(), *rows.shape[1:])
    dist.reduce_scatter_tensor(own, rows.contiguous())
    return own


def gather_constant(rows: Shaped[Tensor, "b *rest"]) -> Shaped[Tensor, "B *rest"]:
    """Rows of all processes in rank order, without gradient."""
    if world_size() == 1:
        return rows.detach()
    # NCCL refuses buffers that are not contiguous, which `empty_like` of a transposed tensor is not; gloo copies them.
    rows = rows.detach().contiguous()
    everywhere = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(everywhere, rows)
    return everywhere


def gather_objects(value: T) -> list[T]:
    """One Python value per process, in rank order."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def together(make: Callable[[], T]) -> T:
    """Call `make` on every process and return its result; an error of one process is raised on all.

    make: must not contain a collective.
    """
    value: list[T] = []
    error: Exception | None = None
    try:
        value.append(make())
    except Exception as problem:
        error = problem
    if problems := [problem for problem in gather_objects(error) if problem is not None]:
        raise error or problems[0]
    return value[0]


def from_main(make: Callable[[], T]) -> T:
    """Call `make` on the main process only; its result is returned, and its error raised, on all."""
    return gather_objects(together(lambda: make() if rank() == 0 else None))[0]  # type: ignore[return-value]


def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite each tensor with the main process's; one broadcast per dtype."""
    if not is_initialized():
        return
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor)
    for own in kinds.values():
        flat = torch.cat([tensor.flatten() for tensor in own])
        dist.broadcast(flat, src=0)
        for tensor, sent in zip(own, flat.split([tensor.numel() for tensor in own]), strict=True):
            tensor.copy_(sent.view_as(tensor))


def mean(values: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Elementwise mean over processes, without gradient."""
    values = values.detach().clone()
    if is_initialized():
        dist.all_reduce(values)
    return values / world_size()


class Agreement:
    """The largest number of any process, known one call later: no process waits for the others or for its GPU."""

    def __init__(self) -> None:
        self.largest, self.exchange = torch.zeros((), dtype=torch.int64), None

    def on(self, number: int) -> int:
        """What the processes gave to the call before this one, 0 at the first; a single process gets its own number."""
        if world_size() == 1:
            return number
        if self.exchange is not None:
            self.exchange.wait()
        known, self.largest = int(self.largest), torch.tensor(number)  # on the CPU, so that gloo exchanges it
        self.exchange = dist.all_reduce(self.largest, op=dist.ReduceOp.MAX, async_op=True)
        return known
