"""What a GPU would refuse or wait for, found without one: whole steps on fake CUDA tensors, backward passes on meta tensors."""

import contextlib
import copy
import functools
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from clipkd.config.shipped import PACKAGE, RECIPES
from clipkd.config.train import StudentConfig
from clipkd.evaluation.embed import Embedder
from clipkd.models.encoder import Encoder
from clipkd.models.initial import create_student, initial_student
from clipkd.objective import memory
from clipkd.training import grad_cache
from clipkd.training import learner as learners
from clipkd.views import Batch
from tests.objective.tiny_clip import FROZEN, OBJECTIVES, TEACHERLESS, make_batch, make_distiller, needs, take_loss
from tests.training import small_steps

CUDA = torch.device("cuda:0")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = [*sorted(path.stem for path in RECIPES.rglob("*.yaml")), "all memory"]
SETTINGS = [(name, precision, 1) for name in NAMES for precision in DTYPES]
SETTINGS += [("gkl", "bf16", 2), ("all memory", "bf16", 2)]
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "native_layer_norm"}
"""Operations that refuse inputs of two types on a GPU, as fake tensors do not."""


class Waits(TorchDispatchMode):
    """Notes the lines of clipkd where the host would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        if name in PRODUCTS or name.startswith("_scaled_dot_product"):
            types = {each.dtype for each in args if isinstance(each, Tensor) and each.is_floating_point()}
            assert len(types) == 1, f"{name} of {types}"
        reads = function is torch.ops.aten._local_scalar_dense.default
        if self.waits(function, args, kwargs):
            frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(PACKAGE))]
            self.found += [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames[-1:]]
        if reads:
            return 1.0 if args[0].is_floating_point() else 1
        return function(*args, **kwargs)

    def waits(self, function: Any, args: Any, kwargs: Any) -> bool:
        if function is torch.ops.aten._local_scalar_dense.default:
            return args[0].is_cuda
        if function is torch.ops.aten._to_copy.default:
            to = kwargs.get("device") or args[0].device
            return to.type != args[0].device.type and not kwargs.get("non_blocking")
        if function is torch.ops.aten.copy_.default:
            return args[0].device.type != args[1].device.type and not (*args[2:], kwargs.get("non_blocking"))[0]
        depends_on_data = (torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default)
        return function in (*depends_on_data, torch.ops.aten.equal.default) and args[0].is_cuda


class Accelerator:
    """What `Learner` asks of Accelerate, on a GPU; gradients are zeros, since backward would need a device."""

    def __init__(self, precision: str) -> None:
        self.device, self.dtype, self.is_main_process = CUDA, DTYPES[precision], True
        self.scaler = torch.amp.GradScaler("cuda") if precision == "fp16" else None
        self.distiller: nn.Module = nn.Identity()

    def prepare(self, distiller: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        self.distiller = distiller

        def model(*inputs: Any) -> Any:
            with self.autocast():
                return distiller(*inputs)

        def step() -> None:
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
                self.scaler.update()

        groups = optimizer.param_groups
        wrapped = SimpleNamespace(optimizer=optimizer, param_groups=groups, step=step, zero_grad=optimizer.zero_grad)
        self.optimizer = optimizer
        return model, wrapped

    def autocast(self) -> torch.autocast:
        return torch.autocast("cuda", dtype=self.dtype, enabled=self.dtype != torch.float32)

    def backward(self, loss: Tensor) -> None:
        assert (loss.device, loss.dtype) == (CUDA, torch.float32)
        loss = loss if self.scaler is None else self.scaler.scale(loss)
        for parameter in self.distiller.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def clip_grad_norm_(self, parameters: Iterator[nn.Parameter], largest: float) -> Tensor:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(parameters, largest)


class Verdict:
    def __init__(self, failed: Tensor) -> None:
        assert (failed.device, failed.dtype, failed.shape) == (CUDA, torch.bool, ())

    def failed(self) -> bool:
        return False


@functools.cache
def model(name: str) -> Encoder:
    torch.manual_seed(0)
    if name == "lit":
        with tempfile.TemporaryDirectory() as folder:
            return initial_student(small_steps.read(small_steps.lit(Path(folder))))
    return small_steps.create_teacher() if name == "teacher" else create_student(StudentConfig(model=name))


def to_gpu(mode: FakeTensorMode, module: nn.Module) -> nn.Module:
    """Make a module's tensors fake ones on a GPU, as `module.to` does to real ones."""
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    with unset_fake_temporarily():
                        content = tensor.detach()
                    fake = (content if mode.is_our_fake(content) else mode.from_tensor(content)).to(CUDA)
                    is_weight = isinstance(tensor, nn.Parameter)
                    own[name] = nn.Parameter(fake, tensor.requires_grad) if is_weight else fake
    return module


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Without a GPU, autocast and the loss scaler switch themselves off, and the rest of a step asks for one."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.amp.grad_scaler, "amp_definitely_not_available", lambda: False, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80e9))
    monkeypatch.setattr(learners, "Verdict", Verdict)
    for name in ("tiny-student", "teacher", "lit"):
        model(name)
    with FakeTensorMode() as mode:
        monkeypatch.setattr(nn.Module, "to", lambda module, device: to_gpu(mode, module))
        yield mode


def make_learner(
    mode: FakeTensorMode, setting: str, options: list[str], precision: str, folder: Path, monkeypatch: Any
):
    chosen = small_steps.with_all_memory(folder) if setting == "all memory" else ["--config", setting]
    teacher = [] if setting in TEACHERLESS else ["--teacher.models", "x"]
    weights = [] if setting not in FROZEN else ["--student.image_weights", "x", "--student.text_weights", "x"]
    config = small_steps.read([*chosen, *options, *teacher, *weights])

    def make(name: str) -> Encoder:
        with unset_fake_temporarily():
            made = copy.deepcopy(model(name))
        return made.to(CUDA)

    monkeypatch.setattr(small_steps, "initial_student", lambda _: make("lit" if weights else "tiny-student").train())
    monkeypatch.setattr(small_steps, "create_teacher", lambda: make("teacher"))
    monkeypatch.setattr(memory, "deepcopy", lambda student: make("tiny-student"))  # a copy would have another mode
    return small_steps.make_learner(config, Accelerator(precision), folder)


@pytest.mark.parametrize(("setting", "precision", "micro_batches"), SETTINGS)
def test_a_step_on_a_gpu_has_all_tensors_there_and_waits_nowhere(
    gpu: FakeTensorMode,
    setting: str,
    precision: str,
    micro_batches: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grad_cache, "gradients", zeros)
    with Waits() as waits:
        options = ["--micro_batches", str(micro_batches)]
        learner = make_learner(gpu, setting, options, precision, tmp_path, monkeypatch)
        for step in range(2):
            with unset_fake_temporarily():
                batch = small_steps.make_batch(learner.views, step)
            waits.found.clear()
            metrics = learner.step(fake(gpu, batch), step)
            learner.finish_step()
            assert waits.found == []
    assert {value.device for name, value in metrics.items() if name != "lr"} == {CUDA}
    state = learner.optimizer.optimizer.state
    assert {tensor.device for moments in state.values() for tensor in moments.values()} == {CUDA}


def fake(mode: FakeTensorMode, batch: Batch) -> Batch:
    moved = {name: mode.from_tensor(getattr(batch, name)) for name in ("ids", "labels")}
    return batch._replace(
        pixels=tuple(map(mode.from_tensor, batch.pixels)), texts=tuple(map(mode.from_tensor, batch.texts)), **moved
    )


def zeros(loss: Tensor, leaves: list[Tensor | None]) -> list[Tensor | None]:
    return [None if leaf is None or not leaf.requires_grad else torch.zeros_like(leaf) for leaf in leaves]


def test_cached_features_of_a_gpu_are_not_those_of_a_cpu() -> None:
    cpu, first, second = (Embedder(model("teacher"), torch.device(name)).sha256 for name in ("cpu", "cuda:0", "cuda:1"))
    assert cpu != first == second


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("tile_size", [None, 3])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_backward_runs_where_tensors_have_no_values(
    name: str, tile_size: int | None, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in it asks for a number or makes a tensor on the CPU."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "manual_seed", lambda _: None)
    objective = copy.copy(OBJECTIVES[name])
    object.__setattr__(objective, "tile_size", tile_size)
    distiller = make_distiller(objective, dtype=torch.float32).to("meta")
    if (queue := distiller.queue) is not None:
        queue.ids, queue.rings = queue.ids.to("meta"), {key: ring.to("meta") for key, ring in queue.rings.items()}
    if (classes := distiller.closed_set) is not None:
        classes.prompts = [prompts.to("meta") for prompts in classes.prompts]
        classes.teacher_classes = classes.teacher_classes.to("meta")
        assert classes.prior is not None
        classes.prior.sums, classes.prior.counts = classes.prior.sums.to("meta"), classes.prior.counts.to("meta")
    for number in range(2):  # the second finds the first in the queue
        view, targets = torch.utils._pytree.tree_map_only(
            Tensor, lambda tensor: tensor.to("meta"), make_batch(dtype=torch.float32, number=number)
        )
        targets = needs(name, targets)
        if micro_batches == 1:
            take_loss(distiller, view, targets, number)[0].backward()
        else:
            grad_cache.backward(
                distiller, view, targets, step=number, micro_batches=micro_batches, reseed=lambda _: None
            )
        distiller.finish_step()
    for parameter in distiller.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert (parameter.grad.is_meta, parameter.grad.dtype) == (True, torch.float32)
