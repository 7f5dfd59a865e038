"""Each file of configs/losses/ against a restatement of the peer's objective: value, feature gradients, own parameters."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipkd.config.parse import parse
from clipkd.config.train import TrainConfig
from clipkd.objective.comparison import Targets
from clipkd.objective.distiller import Distiller
from clipkd.objective.memory import MovingAverage
from clipkd.views import Features, View
from tests.objective.tiny_clip import STUDENT_WIDTH, TEACHER_WIDTH, make_encoder, take_loss
from tests.oracles import peers

CONFIGS = Path(__file__).parents[2] / "configs" / "losses"
DOUBLE = torch.float64
PAIRS = 7


def read(name: str, *options: str) -> TrainConfig:
    """The file as `clipkd train` reads it; a teacher is named where its terms want one."""
    needed = [] if name == "albef" else ["--teacher.models", "x"]
    return parse(["--config", str(CONFIGS / f"{name}.yaml"), *needed, *options])


def unit(seed: int, width: int, num: int = PAIRS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num, width, generator=generator, dtype=DOUBLE), dim=1)


def make_teacher(seed: int, width: int, scale: float) -> Features:
    image = unit(seed, width)
    return Features(image, F.normalize(image + 0.5 * unit(seed + 1, width), dim=1), torch.tensor(scale, dtype=DOUBLE))


class Setting:
    """A distiller with known features: loss and gradients of its side, and leaves for the oracle's."""

    def __init__(self, name: str, *options: str, teacher_width: int = STUDENT_WIDTH, scale: float = 11.3) -> None:
        self.objective = read(name, *options).objective
        torch.manual_seed(3)
        encoder = make_encoder(dtype=DOUBLE)
        self.distiller = Distiller(encoder, self.objective, teacher_dim=teacher_width, queue_capacity=512).double()
        for number, parameter in enumerate(self.distiller.scales.parameters()):
            parameter.data.add_(0.1 * number - 0.2)  # scales that start alike would hide a mix-up
        self.teacher = make_teacher(20, teacher_width, 42.0)
        if self.objective.logit_scale.init is not None:
            scale = self.objective.logit_scale.init
        self.leaves = [unit(1, STUDENT_WIDTH), unit(2, STUDENT_WIDTH), torch.tensor(scale, dtype=DOUBLE)]
        self.parameters = {n: p for n, p in self.distiller.named_parameters() if not n.startswith("student.")}

    def ours(self, *teachers: Features) -> tuple[dict[str, Tensor], list[Tensor]]:
        leaves = [leaf.clone().requires_grad_() for leaf in self.leaves]
        loss, metrics = self.distiller.loss(
            Features(*leaves), Targets(teachers or (self.teacher,), ids=torch.arange(PAIRS))
        )
        return metrics, list(torch.autograd.grad(loss, [*leaves, *self.parameters.values()], allow_unused=True))

    def theirs(self, oracle: Any) -> tuple[Tensor, list[Tensor]]:
        """oracle(image, text, scale, parameters) → loss; `parameters` are leaves equal to the distiller's."""
        leaves = [leaf.clone().requires_grad_() for leaf in self.leaves]
        copies = {name: p.detach().clone().requires_grad_() for name, p in self.parameters.items()}
        loss = oracle(*leaves, copies)
        return loss.detach(), list(torch.autograd.grad(loss, [*leaves, *copies.values()], allow_unused=True))

    def agree(self, oracle: Any, *teachers: Features, soft_ce: bool = False) -> None:
        """soft_ce: the oracle has the soft cross-entropy of what kl is, larger by the teacher's entropy."""
        metrics, gradients = self.ours(*teachers)
        loss, expected = self.theirs(oracle)
        entropy = self.objective.kl.weight * metrics["kl_teacher_entropy"].item() if soft_ce else 0.0
        assert metrics["loss"].item() + entropy == pytest.approx(loss.item(), rel=1e-11)
        names = ["image", "text", "scale", *self.parameters]
        assert len(names) == len(gradients) == len(expected)
        for name, gradient, wanted in zip(names, gradients, expected, strict=True):
            if wanted is None or gradient is None:
                assert gradient is None or not gradient.any(), name
                assert wanted is None or not wanted.any(), name
            else:
                assert torch.allclose(gradient, wanted, rtol=1e-9, atol=1e-12), name
                assert gradient.abs().max() > 1e-9, name


def project(features: Tensor, parameters: dict[str, Tensor], side: str) -> Tensor:
    """The student's features in the teacher's space, by the weights in a dictionary."""
    weight = parameters.get(f"{side}_projection.weight")
    return features if weight is None else F.normalize(features @ weight.T, dim=1)


def own_scale(parameters: dict[str, Tensor], name: str) -> Tensor:
    return parameters[f"scales.{name}_logit_scale"].exp()


def test_every_file_has_its_test() -> None:
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert names == {"openclip", "clip_kd", "clip_rd", "tinyclip", "mobileclip", "albef", "gkl"}


def test_openclip() -> None:
    setting = Setting("openclip")
    setting.agree(
        lambda image, text, scale, _: peers.open_clip_distill((image, text, scale), setting.teacher[:3]), soft_ce=True
    )


@pytest.mark.parametrize("width", [STUDENT_WIDTH, TEACHER_WIDTH])
@pytest.mark.parametrize("name", ["clip_kd", "clip_rd"])
def test_clip_kd_and_clip_rd(name: str, width: int) -> None:
    setting = Setting(name, teacher_width=width)

    def oracle(image: Tensor, text: Tensor, scale: Tensor, p: dict[str, Tensor]) -> Tensor:
        projected = (project(image, p, "image"), project(text, p, "text"))
        models = ((image, text, scale), projected, own_scale(p, "cross"), setting.teacher[:3])
        if name == "clip_kd":
            return peers.clip_kd(*models)["total"]
        return peers.clip_rd(*models, own_scale(p, "image"), own_scale(p, "text"))["total"]

    setting.agree(oracle)
    metrics, _ = setting.ours()
    parts = {"info_nce", "kl", "icl", "features"} | ({"vrd", "xrd"} if name == "clip_rd" else set())
    assert parts <= metrics.keys()
    assert setting.leaves[2] != setting.teacher.logit_scale


def test_tinyclip() -> None:
    setting = Setting("tinyclip")
    t = setting.teacher
    setting.agree(lambda image, text, scale, _: peers.tinyclip(image, text, t.image, t.text) + 0 * scale)
    model: Any = setting.distiller.student.model
    assert model.logit_scale.exp().item() == pytest.approx(50.0, rel=1e-12)
    assert not model.logit_scale.requires_grad


@pytest.mark.parametrize(
    ("lam", "scales", "options"),
    [
        (1.0, (100.0, 100.0), ()),
        (
            0.75,
            (70.0, 60.0),
            (
                *("--objective.info_nce.weight", "0.25", "--objective.kl.weight", "0.75"),
                *("--objective.logit_scale.teacher", "[70, 60]"),
            ),
        ),
    ],
)
def test_mobileclip_with_two_teachers(lam: float, scales: tuple[float, float], options: tuple[str, ...]) -> None:
    setting = Setting("mobileclip", "--teacher.models", "x", "y", *options)
    teachers = [make_teacher(30, STUDENT_WIDTH, 5.0), make_teacher(40, TEACHER_WIDTH, 8.0)]  # own scales are overruled
    fixed = [(t.image, t.text, torch.tensor(s, dtype=DOUBLE)) for t, s in zip(teachers, scales, strict=True)]
    setting.agree(
        lambda image, text, scale, _: peers.mobileclip(image, text, scale, fixed, lam), *teachers, soft_ce=True
    )


@pytest.mark.parametrize(("filled", "temperature"), [(0, 1), (3, 1), (10, 2)])
def test_gkl_on_teacher_keys_with_a_queue(filled: int, temperature: int) -> None:
    setting = Setting("gkl", "--objective.gkl.temperature", str(temperature), teacher_width=TEACHER_WIDTH)
    t, term = setting.teacher, setting.objective.gkl
    queue = setting.distiller.queue
    assert queue is not None
    old = {side: unit(50 + number, TEACHER_WIDTH, filled) for number, side in enumerate(("image", "text"))}
    queue.rings = {name: ring.double() for name, ring in queue.rings.items()}
    queue.push(torch.arange(100, 100 + filled), {f"teacher_{side}": rows for side, rows in old.items()})

    def oracle(image: Tensor, text: Tensor, scale: Tensor, p: dict[str, Tensor]) -> Tensor:
        loss = peers.info_nce(image, text, scale)
        for query, key, side, other in ((image, "text", "image", "text"), (text, "image", "text", "image")):
            keys = torch.cat([getattr(t, key), old[other]])
            student = scale * project(query, p, side) @ keys.T
            teacher = t.logit_scale * getattr(t, side) @ keys.T
            options = {name: getattr(term, name) for name in ("ce_weight", "mse_weight", "gamma", "temperature")}
            loss = loss + peers.gkl(student, teacher, **options) / 2
        return loss

    setting.agree(oracle)


@pytest.mark.parametrize("batch", [4, 3])
@pytest.mark.parametrize("repeated", [False, True])
def test_albef_over_20_steps(batch: int, repeated: bool) -> None:
    """Losses and weights after 20 optimizer steps: the queue wraps around several times, α rises, ids come back."""
    capacity, steps, ramp = 10, 20, 12
    config = read("albef", "--objective.warmup_steps", str(ramp))
    policy, momentum = config.objective.logit_scale, config.optim.ema_momentum
    assert (config.objective.itc.momentum_share, momentum, policy.maximum) == (0.4, 0.995, 1000)
    assert policy.init == pytest.approx(1 / 0.07)

    distiller = Distiller(
        make_encoder(dtype=DOUBLE, seed=5), config.objective, teacher_dim=None, queue_capacity=capacity
    ).double()
    assert distiller.queue is not None
    distiller.queue.rings = {name: ring.double() for name, ring in distiller.queue.rings.items()}
    average = MovingAverage(distiller.student, momentum)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.3)

    restated = make_restated(5, policy.init)
    oracle = peers.Albef(restated, capacity, momentum, alpha=0.4, ramp_steps=ramp, max_scale=1000.0)
    other = torch.optim.SGD(restated.parameters(), lr=0.3)

    generator = torch.Generator().manual_seed(9)
    losses = []
    for step in range(steps):
        images = torch.randn(batch, 3, 2, 2, generator=generator, dtype=DOUBLE)
        texts = torch.randint(0, 12, (batch, 3), generator=generator)
        ids = (step * batch + torch.arange(batch)) % (7 if repeated else 10**6)
        with torch.no_grad():
            seen = average.model.features(View(images, texts))
        loss, _ = take_loss(distiller, View(images, texts), Targets((), seen, ids), step)
        expected = oracle.step(images, texts, ids, step)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-10), step
        for optimise, value in ((optimizer, loss), (other, expected)):
            optimise.zero_grad()
            value.backward()
            optimise.step()
        distiller.clamp_logit_scales()
        distiller.finish_step()
        average.update()
        losses.append(loss.item())
    assert len(distiller.queue) == capacity
    assert distiller.queue.num_pushed == steps * batch > 5 * capacity
    assert max(losses) - min(losses) > 0.1
    restated.logit_scale.data.clamp_(0, math.log(1000))  # ALBEF clamps when the next step begins
    ours, theirs = distiller.student.model.state_dict(), restated.model.state_dict()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, rtol=0, atol=1e-9), name


def make_restated(seed: int, scale: float) -> Any:
    """The same student once more, with the interface of the restatement."""
    encoder: Any = make_encoder(dtype=DOUBLE, seed=seed)
    encoder.model.logit_scale.data.fill_(math.log(scale))

    class Restated(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.logit_scale = encoder.model, encoder.model.logit_scale

        def encode_image(self, images: Tensor) -> Tensor:
            return F.normalize(self.model.visual(images), dim=-1)

        def encode_text(self, texts: Tensor) -> Tensor:
            return F.normalize(self.model.encode_text(texts), dim=-1)

    return Restated()
