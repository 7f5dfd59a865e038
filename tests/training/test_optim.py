"""The learning rate as a function of the step, and which parameters decay."""

import pytest
import torch
from torch import nn

from clipkd.config.train import StudentConfig
from clipkd.models.initial import create_student
from clipkd.training.optim import block_depths, learning_rate, parameter_groups, set_learning_rate


def test_learning_rate_by_hand() -> None:
    rates = [learning_rate(step, peak=2.0, warmup_steps=4, steps=12) for step in range(13)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    # Half a cosine over 8 steps: a quarter, half and three quarters of the way, then the end.
    assert [rates[6], rates[8], rates[10]] == pytest.approx([1 + 0.5**0.5, 1.0, 1 - 0.5**0.5])
    assert rates[12] == pytest.approx(0.0, abs=1e-15)
    assert learning_rate(0, peak=0.3, warmup_steps=0, steps=1) == 0.3  # without warm-up the first step has the peak
    assert learning_rate(9, peak=1.0, warmup_steps=20, steps=10) == 0.5  # the run may end within the warm-up


def test_matrices_decay_and_each_group_has_its_own_rate() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 2, bias=False), nn.LayerNorm(4), nn.Linear(4, 5), nn.Embedding(7, 4))
    network.positional_embedding = nn.Parameter(torch.zeros(9, 4))
    network.class_embedding = nn.Parameter(torch.zeros(4))
    network.logit_scale = nn.Parameter(torch.zeros(()))
    network.logit_bias = nn.Parameter(torch.zeros(1))
    network.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = parameter_groups(network.named_parameters(), weight_decay=0.2, logit_scale_lr=10.0)
    assert [(group["weight_decay"], {names[id(parameter)] for parameter in group["params"]}) for group in groups] == [
        (0.2, {"0.weight", "2.weight", "3.weight", "positional_embedding"}),
        (0.0, {"1.weight", "1.bias", "2.bias", "class_embedding"}),
        (0.0, {"logit_scale", "logit_bias"}),
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    for _ in range(2):  # not cumulative
        set_learning_rate(optimizer, 0.03)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.03, 0.03, 0.3])
    # Groups without parameters are left out.
    (only,) = parameter_groups(nn.Linear(2, 3, bias=False).named_parameters(), weight_decay=0.1, logit_scale_lr=1.0)
    assert len(only["params"]) == 1


def test_depth_counts_the_blocks_above() -> None:
    student = create_student(StudentConfig(model="tiny-teacher"))
    config = student.model_config or {}
    image, text = config["vision_cfg"]["layers"], config["text_cfg"]["layers"]
    expected = {
        "visual.conv1.weight": image + 1,
        "visual.positional_embedding": image + 1,
        "visual.proj": 0,
        "visual.transformer.resblocks.0.ln_1.weight": image,
        "transformer.resblocks.0.mlp.c_fc.weight": text,
        "token_embedding.weight": text + 1,
        "ln_final.weight": 0,
        "text_projection": 0,
        "logit_scale": 0,
    }
    found = block_depths(name for name, _ in student.model.named_parameters())
    assert {name: found[name] for name in expected} == expected


def test_fresh_parameters_have_their_own_rate_and_loaded_ones_decay_with_depth() -> None:
    names = ["conv_stem.weight", "blocks.0.a.weight", "blocks.1.a.weight", "head.proj.weight"]
    parameters = [(f"student.model.visual.{name}", nn.Parameter(torch.zeros(2, 2))) for name in names]
    parameters += [("image_projection.weight", nn.Parameter(torch.zeros(2, 2)))]
    groups = parameter_groups(
        parameters,
        weight_decay=0.1,
        logit_scale_lr=1.0,
        loaded={f"visual.{name}" for name in names[:3]},
        fresh_lr=5.0,
        layer_decay=0.5,
    )
    factor = {id(p): group["lr_factor"] for group in groups for p in group["params"]}
    assert [factor[id(parameter)] for _, parameter in parameters] == [0.125, 0.25, 0.5, 5.0, 5.0]
