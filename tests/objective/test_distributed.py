"""Two processes on halves of a batch against one process on the whole: gloo on CPU, in real subprocesses."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from torch import Tensor

from clipkd import distributed
from tests.objective import two_processes
from tests.objective.tiny_clip import OBJECTIVES, steps
from tests.processes import run_two

Seen = tuple[dict[str, Tensor], dict[str, Any]]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    """Tensors and facts as each of two processes saw them."""
    folder = tmp_path_factory.mktemp("gloo")
    run_two(two_processes.__file__, folder)
    return [(load_file(folder / f"{r}.safetensors"), json.loads((folder / f"{r}.json").read_text())) for r in range(2)]


@pytest.mark.parametrize(
    ("launched", "gpu", "on_cpu", "expected"),
    [
        (False, True, False, {}),
        (True, False, True, {"timeout": distributed.TIMEOUT}),
        (True, True, True, {"timeout": distributed.TIMEOUT}),
        (True, True, False, {"timeout": distributed.TIMEOUT, "backend": "cpu:gloo,cuda:nccl"}),
    ],
)
def test_several_processes_wait_an_hour_and_objects_stay_off_the_gpu(
    launched: bool, gpu: bool, on_cpu: bool, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert distributed.process_group_options(on_cpu=on_cpu) == expected
    assert distributed.TIMEOUT.total_seconds() == 3600


def test_what_of_accelerate_s_settings_would_break_a_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # as in a fresh process
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert distributed.make_accelerator("fp32").ddp_handler.gradient_as_bucket_view  # no second copy of the gradients
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    with pytest.raises(ValueError, match=r"set to compile the model \(dynamo\).*set objective\.compile"):
        distributed.make_accelerator("fp32")
    # On a Mac Accelerate takes the GPU by itself.
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # which Accelerate sets
    for module in (torch.accelerator, torch.backends.mps):
        monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    with pytest.raises(ValueError, match="not on mps; set ACCELERATE_USE_CPU=true"):
        distributed.make_accelerator("fp32")


def test_a_task_that_sees_one_gpu_gives_ddp_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    state = SimpleNamespace(device=torch.device("cuda:0"), local_process_index=3)
    monkeypatch.setattr(distributed, "PartialState", lambda **_: state)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert distributed.join_processes().local_process_index == 0
    assert not torch.backends.cudnn.allow_tf32


OWN = [[[3.0], [30.0]], [[300.0], [3000.0]]]
"""What both processes say of the rows of each: weights 1, 10, 100, 1000 on process 0 and twice that on process 1."""

BY_HAND = {
    "gathered": [[[1.0], [2.0], [3.0], [4.0]]] * 2,
    "gathered integers": [[0, 5, 1, 5]] * 2,
    "gathered transposed": [[[0.0, 1.0], [2.0, 3.0], [10.0, 11.0], [12.0, 13.0]]] * 2,
    "gathered cube": [[[[0.0] * 3] * 2, [[1.0] * 3] * 2]] * 2,
    **dict.fromkeys(("gradient", "gradient of a second backward", "gradient in a sum", "sum of own rows"), OWN),
    "gradient of the other summand": [[[each * factor] for each in (1.0, 10.0, 100.0, 1000.0)] for factor in (1, 2)],
    "mean": [[2.0, 20.0]] * 2,
    "buffer 0": [[1.5]] * 2,
    "buffer 1": [7] * 2,
    "buffer 2": [[True]] * 2,
    "buffer 3": [[[4.0] * 2] * 3] * 2,
}
FACTS = {
    "world_size": [2, 2],
    "rank": [0, 1],
    "objects": [[{"rank": 0}, {"rank": 1}]] * 2,
    "agreed": [[0, 0, 15, 0]] * 2,  # one call later
    "together": [0, 1],
    "problem": ["invalid literal for int() with base 10: 'no number'"] * 2,
    "uneven": ["the processes bring [4, 5] pairs; every batch needs the same number on every process"] * 2,
    "exchanges": [[1, 1, 1]] * 2,  # of gradients, with 1, 2 and 4 micro-batches
    "constant_requires_grad": [False, False],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_collectives_by_hand(processes: list[Seen], name: str) -> None:
    assert [tensors[name].tolist() for tensors, _ in processes] == BY_HAND[name]


@pytest.mark.parametrize("name", FACTS)
def test_both_processes_agree_on_what_one_of_them_knows(processes: list[Seen], name: str) -> None:
    assert [facts[name] for _, facts in processes] == FACTS[name]


@pytest.mark.parametrize(
    ("how", "dtype", "tolerance"),
    [
        ("torch.float64", torch.float64, 1e-12),
        ("torch.float32", torch.float32, 1e-5),
        # A few queries, or a few pairs through the towers at a time, against the whole batch on one process.
        ("panels", torch.float64, 1e-12),
        ("micro-batches", torch.float64, 1e-12),
        ("panels of micro-batches", torch.float64, 1e-12),
        ("frozen text", torch.float64, 1e-12),
        ("frozen text in parts", torch.float64, 1e-12),
    ],
)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_give_the_loss_and_gradients_of_one(
    processes: list[Seen], name: str, how: str, dtype: torch.dtype, tolerance: float
) -> None:
    frozen = how.startswith("frozen text")
    whole = steps(name, dtype, frozen_text=frozen)
    assert_equal_together(processes, f"{name}/{how}/", whole, tolerance)
    assert ("memory/queue/ids" in whole) == (name.startswith("queued") or name == "ramped")
    assert sum(key.startswith("gradient/") for key in whole) >= (4 if frozen else 7)
    assert any("token_embedding" in key for key in whole) != frozen
    uses_projection = name in ("teacher keys", "features alone", "relations", "queued teacher keys", "queued sigmoid")
    assert ("gradient/image_projection.weight" in whole) == uses_projection
    assert ("gradient/student.model.logit_scale" in whole) == (name != "features alone")
    assert whole["metric/loss"] > 0.1


@pytest.mark.parametrize("name", two_processes.RECIPES)
def test_two_processes_take_every_recipe_s_steps_of_one(processes: list[Seen], name: str) -> None:
    assert len(two_processes.RECIPES) >= 12
    assert_equal_together(processes, f"{name}/recipe/", steps(name, torch.float64), 1e-12)


def assert_equal_together(processes: list[Seen], prefix: str, whole: dict[str, Tensor], tolerance: float) -> None:
    """Series are the mean over the processes; gradients and memory are the same on each."""
    halves = [
        {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        for tensors, _ in processes
    ]
    assert [set(half) for half in halves] == [set(whole)] * 2
    for key, expected in whole.items():
        if key.startswith("memory/"):  # pushed from gathered batches: the same bits on every process
            assert all(torch.equal(half[key], expected) for half in halves), key
        elif key.startswith("metric/"):
            mean = torch.stack([half[key] for half in halves]).mean()
            assert mean.item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance), key
        else:
            for half in halves:  # DDP leaves the same average on every process
                error = (half[key] - expected).norm().item()
                assert error <= tolerance * max(expected.norm().item(), 1e-3), f"{key}: {error}"


def test_gradients_are_exchanged_though_the_last_micro_batch_has_no_class_prompts(processes: list[Seen]) -> None:
    whole = steps("closed set", torch.float64, pairs=16)
    gradients = {key: value for key, value in whole.items() if key.startswith("gradient/")}
    assert any("token_embedding" in key for key in gradients)
    for tensors, _ in processes:
        for key, expected in gradients.items():
            torch.testing.assert_close(tensors[f"parts without prompts/{key}"], expected, rtol=1e-10, atol=1e-12)


def test_dropout_is_the_same_in_both_passes_on_two_processes(processes: list[Seen]) -> None:
    for tensors, _ in processes:
        whole = {key.split("/", 1)[1]: value for key, value in tensors.items() if key.startswith("dropped whole/")}
        assert {"student.model.visual.1.weight", "student.model.logit_scale"} <= whole.keys()
        for name, expected in whole.items():
            torch.testing.assert_close(tensors[f"dropped parts/{name}"], expected, rtol=1e-10, atol=1e-12)


def test_halves_alone_have_another_loss_than_the_whole(processes: list[Seen]) -> None:
    """Keys and row weights come from both processes: the two losses differ, only their mean is that of one process."""
    for name in ("teacher keys", "student keys"):
        first, second = (tensors[f"{name}/torch.float64/metric/loss"].item() for tensors, _ in processes)
        assert abs(first - second) > 1e-3 * first


def test_on_one_process_every_function_is_the_identity() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    assert (distributed.world_size(), distributed.rank()) == (1, 0)
    assert distributed.gather(rows) is rows
    assert distributed.gather_constant(rows).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert not distributed.gather_constant(rows).requires_grad
    assert distributed.gather_objects("x") == ["x"]
    values = torch.tensor([1.0, 5.0])
    assert distributed.mean(values).tolist() == [1.0, 5.0]
    assert distributed.mean(values) is not values
    distributed.barrier()
    assert distributed.Agreement().on(15) == 15
