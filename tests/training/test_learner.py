"""A step that is not finite touches nothing, is known before anything reads the step's outcome, and names its samples."""

import contextlib
import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from clipkd import distributed
from clipkd.config.parse import parse
from clipkd.progress import Stopwatch
from clipkd.training import run as run_module
from clipkd.training.assemble import require_installed
from clipkd.training.learner import Learner
from clipkd.training.ledger import Ledger
from clipkd.training.run import Run
from clipkd.views import Features
from tests.objective.tiny_clip import make_encoder
from tests.training.small_steps import make_batch, make_learner, read, with_all_memory


@pytest.fixture
def learner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Learner:
    """After one good step."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    made = make_learner(read(with_all_memory(tmp_path)), distributed.make_accelerator("fp32"), tmp_path / "run")
    made.step(make_batch(made.views, 0), 0)
    made.finish_step()
    return made


def state(learner: Learner) -> dict[str, Tensor]:
    """Everything that a checkpoint holds."""
    distiller, optimizer, ema = learner.distiller, learner.optimizer.optimizer, learner.ema
    assert ema is not None
    found = {**distiller.state_dict(), **{f"ema/{name}": tensor for name, tensor in ema.model.state_dict().items()}}
    found |= {f"memory/{name}": tensor for name, tensor in distiller.memory().items()}
    moments = {name: optimizer.state[parameter] for name, parameter in distiller.named_parameters()}
    found |= {f"{name}/{key}": value for name, own in moments.items() for key, value in own.items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def spoil(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's features of the next step are NaN."""
    features = learner.teachers.features

    def once(*batch: Any) -> tuple[Features, ...]:
        monkeypatch.setattr(learner.teachers, "features", features)
        return tuple(found._replace(image=found.image * torch.nan) for found in features(*batch))

    monkeypatch.setattr(learner.teachers, "features", once)


@pytest.mark.parametrize(
    "end",
    [lambda learner: learner.finish_step(), lambda learner: learner.step(make_batch(learner.views, 2), 2)],
    ids=["its own end", "the next step"],
)
def test_a_step_that_is_not_finite_touches_nothing_and_names_its_samples(
    learner: Learner, monkeypatch: pytest.MonkeyPatch, end: Callable[[Learner], None]
) -> None:
    before = state(learner)
    assert {"memory/queue/num_pushed", "memory/class_prior/sums", "student.model.logit_scale/step"} <= before.keys()
    spoil(learner, monkeypatch)
    batch = make_batch(learner.views, 1)
    learner.step(batch, 1)
    with pytest.raises(FloatingPointError, match=r"step 2: the loss is nan.*teacher.models\[0\]'s image features"):
        end(learner)
    assert differing(state(learner), before) == set()
    record = json.loads((Path(learner.config.output) / "nonfinite_step_000002.json").read_text())
    assert record["keys"] == list(batch.keys)
    learner.step(make_batch(learner.views, 2), 1)  # a good one changes all of it
    learner.finish_step()
    changed = differing(state(learner), before)
    assert {"memory/queue/num_pushed", "memory/class_prior/sums", "student.model.logit_scale/step"} <= changed
    assert len(changed) > 0.9 * len(before)


def test_under_fp16_a_loss_that_is_not_finite_fails_and_an_infinite_gradient_lowers_the_scale(
    learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a loss scaler on the CPU, unscaled as Accelerate does it under fp16."""
    accelerator, before = learner.accelerator, state(learner)
    scaler = accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    accelerator.native_amp = True
    learner.optimizer = AcceleratedOptimizer(learner.optimizer.optimizer, scaler=scaler)
    accelerator._optimizers = [learner.optimizer]
    monkeypatch.setattr(type(accelerator), "mixed_precision", "fp16")
    backward = accelerator.backward

    def overflow(loss: Tensor) -> None:
        backward(loss)
        next(p for p in learner.distiller.parameters() if p.grad is not None).grad.add_(torch.inf)  # type: ignore

    def lose(loss: Tensor) -> None:
        backward(loss)
        loss.data.fill_(torch.nan)  # finite gradients all the same

    for fault in (overflow, lose):
        monkeypatch.setattr(accelerator, "backward", fault)
        learner.step(make_batch(learner.views, 1), 1)
        changed = {name for name in differing(state(learner), before) if not name.startswith(("ema/", "memory/"))}
        assert changed == set()
        if fault is overflow:
            learner.finish_step()
            assert scaler.get_scale() == 1.0
    with pytest.raises(FloatingPointError, match="step 2: the loss is nan"):
        learner.finish_step()
    assert scaler.get_scale() == 0.5  # below 1 the next one fails, too
    monkeypatch.setattr(accelerator, "backward", backward)
    learner.step(make_batch(learner.views, 1), 1)
    with pytest.raises(FloatingPointError, match=r"step 2: the loss is [0-9]"):
        learner.finish_step()


def test_a_teacher_in_half_precision_computes_in_its_own_and_a_convolutional_one_channels_last() -> None:
    """Autocast would compute float16 in bfloat16. Layout: bytes and floats, equal to the usual one."""
    seen: list[tuple[torch.dtype, bool]] = []

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))

        def forward(self, images: Tensor) -> Tensor:
            found = self.layers(images)
            seen.append((found.dtype, found.is_contiguous(memory_format=torch.channels_last)))
            return found.mean(dim=(2, 3))

    plain = make_encoder()
    plain.model.visual, plain.image_tower = Tower(), lambda towers, images: towers.visual(images)
    encoder = copy.deepcopy(plain).prefer_channels_last()
    pixels = torch.randint(0, 256, (2, 3, 9, 9), dtype=torch.uint8)
    for images in (pixels, encoder.spec.normalize(pixels)):
        torch.testing.assert_close(encoder.encode_image(images), plain.encode_image(images), rtol=0, atol=1e-6)
    assert seen == [(torch.float32, True), (torch.float32, False)] * 2
    seen.clear()
    encoder.hold_in(torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder.encode_image(pixels).dtype == torch.float32
        assert encoder.encode_text(torch.zeros(2, 3, dtype=torch.int64)).dtype == torch.float32
    assert seen == [(torch.float16, True)]
    assert make_encoder().prefer_channels_last().memory_format == torch.contiguous_format


@pytest.mark.parametrize("seconds", [19, 21])
def test_a_save_of_more_than_20_seconds_is_warned_of(
    seconds: int, learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(learner.config, learner, SimpleNamespace(places={}), Ledger(None, {}), None, None, {}, 1, Stopwatch(0.0))  # type: ignore[arg-type]
    clock = iter((100, 100 + seconds))
    monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    slow = pytest.warns(UserWarning, match=r"the checkpoint took 21 s, .* set TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    with slow if seconds > 20 else contextlib.nullcontext():
        run.save()
    assert next(clock, None) is None


@pytest.mark.parametrize(("device", "compilers"), [("cpu", ("g++", "clang++", "c++")), ("cuda", ("gcc", "clang"))])
def test_the_compiler_that_a_device_needs_is_asked_for(
    device: str, compilers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, there = parse(["--objective.compile", "true"]), list[str]()
    monkeypatch.setattr(distributed, "join_processes", lambda: SimpleNamespace(device=device))
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    there[:] = {"g++", "clang++", "c++", "gcc", "clang"} - set(compilers)
    with pytest.raises(ValueError, match=rf"needs a C(\+\+)? compiler \({re.escape(compilers[0])} or "):
        require_installed(config)
    for name in compilers:
        there[:] = [name]
        require_installed(config)
