"""`clipkd train`: the same numbers on one and two processes, after a kill, and with any teacher."""

import json
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clipkd import files
from clipkd.models.load import load_model
from tests.e2e.conftest import SMALL, Run
from tests.e2e.runs import assert_close_runs, read_metrics, saved, tmpfs, with_all_terms


def test_two_processes_log_the_losses_of_one(clipkd: Run, data: Path, teacher: Path, tmp_path: Path) -> None:
    """Two of them in micro-batches and a query at a time, one with the whole batch."""
    arguments = (*SMALL, *with_all_terms(data), "--steps", 6, "--teacher.models", f"local-dir:{teacher}")
    arguments += ("--data.path", data / "pairs")
    clipkd("train", *arguments, "--output", tmp_path / "one")
    small = ("--micro_batches", 4, "--objective.tile_size", 10)
    done = clipkd("train", *arguments, *small, "--output", tmp_path / "two", processes=2)
    assert "trained 6 steps" in done.stdout
    assert done.stdout.count("trained") == 1  # one process speaks
    assert_close_runs(tmp_path / "one", tmp_path / "two", world_sizes={2})
    one = read_metrics(tmp_path / "one")
    assert [row["step"] for row in one] == [1, 2, 3, 4, 5, 6]
    assert one[0]["loss"] != one[5]["loss"]
    logged = {"loss", "gkl_kl", "gkl_wmse", "closed_set_kl", "itc", "logit_scale", "cross_logit_scale", "grad_norm"}
    assert logged <= one[0].keys()


def test_two_teachers_of_a_recipe_give_two_processes_the_losses_of_one(
    clipkd: Run, data: Path, teacher: Path, tmp_path: Path
) -> None:
    arguments = (*SMALL, "--config", "mobileclip", "--data.path", data / "pairs", "--steps", 4)
    teachers = ("--teacher.models", f"local-dir:{teacher}", teacher.parent / "run")
    for processes in (1, 2):
        options = ("--objective.logit_scale.teacher", "[70, 60]", "--output", tmp_path / str(processes))
        clipkd("train", *arguments, *teachers, *options, processes=processes)
    assert_close_runs(tmp_path / "1", tmp_path / "2", world_sizes={2})


def test_a_run_is_not_overwritten_and_a_full_disk_says_what_to_do(clipkd: Run, data: Path, tmp_path: Path) -> None:
    """The configuration file may stand first."""
    (tmp_path / "recipe.yaml").write_text("steps: 2\n")
    arguments = (tmp_path / "recipe.yaml", *SMALL, "--data.path", data / "pairs", "--output", tmp_path / "run")
    assert "trained 2 steps" in clipkd("train", *arguments).stdout
    again = clipkd("train", *arguments, check=False)
    assert (again.returncode, "--resume latest" in again.stderr) == (2, True)
    other = clipkd("train", *arguments, "--resume", "latest", "--optim.learning_rate", "1e-4", check=False)
    assert other.returncode == 2
    assert "optim.learning_rate = 0.001, now it is 0.0001" in other.stderr
    assert len(read_metrics(tmp_path / "run")) == 2
    with tmpfs(tmp_path / "small", "2m") as small:  # too small for a checkpoint
        done = clipkd("train", *arguments, "--output", small / "run", check=False, processes=2)
        assert not list((small / "run" / "checkpoints").iterdir())
    assert done.returncode == 1
    assert "Traceback" not in done.stderr  # of the process that does not save
    line = next(line for line in done.stderr.splitlines() if "error" in line)
    assert "No space left on device" in line
    assert "; free space, then " in line


def test_evaluation_on_the_way_keeps_the_best_checkpoint_and_is_made_up_for_after_a_kill(
    clipkd: Run, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = (*SMALL, "--data.path", data / "pairs", "--steps", 5, "--optim.ema_momentum", 0.5, "--output", run)
    arguments += ("--checkpoint.every_steps", 1, "--checkpoint.keep", 2, "--evaluation.data", f"[{data / 'noto'}]")
    arguments += ("--evaluation.every_steps", 2, "--log.trackers", "[tensorboard]")
    done = clipkd("train", *arguments, "--evaluation.best", "noto:acc5", processes=2)
    rows = files.read_rows(run / "results.jsonl")
    assert [(row["step"], row["weights"]) for row in rows] == [(s, w) for s in (2, 4, 5) for w in ("student", "ema")]
    assert {row["n"] for row in rows} == {32}
    scores = {row["step"]: row["metrics"]["acc5"] for row in rows if row["weights"] == "ema"}
    best = min(step for step, score in scores.items() if score == max(scores.values()))
    assert json.loads((run / "best" / "state.json").read_text())["step"] == best
    assert f"step {best} is the best so far" in done.stderr
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f"step_{n:06d}" for n in (4, 5)}
    evaluated = ("--model", run / "best", "--weights", "ema", "--data", data / "noto")
    clipkd("eval", *evaluated, "--output", tmp_path / "results")
    (row,) = files.read_rows(tmp_path / "results" / "eval_results.jsonl")
    assert (row["metrics"]["acc5"], row["checkpoint"]) == (scores[best], str(run / "best"))
    shutil.rmtree(run / "checkpoints" / "step_000005")
    (run / "results.jsonl").write_text("")
    clipkd("train", *arguments, "--resume", "latest")
    assert [row["step"] for row in files.read_rows(run / "results.jsonl")] == [4, 4, 5, 5]
    events = EventAccumulator(str(run / "clipkd"))
    events.Reload()
    assert [event.step for event in events.Scalars("noto/ema/acc5")] == [2, 4, 4, 5]  # 4 was evaluated again
    assert events.Scalars("noto/ema/acc5")[0].value == pytest.approx(scores[2])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert {"lr", "skipped", "noto/acc1"} <= set(events.Tags()["scalars"])
    assert {"report/loss", "report/learning rate", "report/top-5 accuracy"} <= set(events.Tags()["images"])


def test_a_non_finite_loss_stops_the_run_before_the_weights_and_names_the_samples(
    clipkd: Run, data: Path, tmp_path: Path
) -> None:
    arguments = (*SMALL, "--data.path", data / "pairs", "--steps", 5, "--output", tmp_path / "run")
    arguments += ("--optim.learning_rate", "1e30", "--optim.clip_norm", 0)
    done = clipkd("train", *arguments, check=False, processes=2)
    assert done.returncode == 1
    assert "stopped before the weights were touched" in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
    (record,) = (tmp_path / "run").glob("nonfinite_step_*.json")
    assert str(record) in done.stderr
    stop = json.loads(record.read_text())
    assert len(set(stop["keys"])) == 16
    assert len(stop["loss"]) == 2
    assert all(".tar/" in key for key in stop["keys"])


@pytest.mark.parametrize(
    ("teacher", "dtype", "term", "others", "scale", "width"),
    [
        ("clip_folder", "fp32", "gkl", "", 14.2857, 8),
        ("siglip_folder", "bf16", "soft_bce", "sigmoid.weight=1 info_nce.weight=0 logit_scale.init=10", 9.974, 16),
    ],
)
def test_a_teacher_sees_its_own_resolution_and_tokens(
    clipkd: Run,
    data: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    teacher: str,
    dtype: str,
    term: str,
    others: str,
    scale: float,
    width: int,
) -> None:
    options = (f"{term}.weight=1", "features.weight=1", *others.split())
    arguments = (*SMALL, *(f"--objective.{option}" for option in options), "--data.path", data / "pairs", "--steps", 2)
    models = ("--teacher.models", request.getfixturevalue(teacher), "--teacher.dtype", dtype)
    clipkd("train", *arguments, *models, "--precision", "bf16", "--output", tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    assert [row["teacher_logit_scale"] for row in rows] == pytest.approx([scale] * 2, rel=1e-3)
    assert all(row[term] > 0 and row["features"] > 0 for row in rows)
    weights = saved(tmp_path / "run", 2)
    assert weights["image_projection.weight"].shape == (width, 128)
    assert not any(name.startswith("teacher") for name in weights)


@pytest.mark.slow
def test_a_timm_tower_is_a_student(clipkd: Run, data: Path, tmp_path: Path) -> None:
    config = {
        "embed_dim": 32,
        "vision_cfg": {"timm_model_name": "resnet10t", "timm_model_pretrained": False, "image_size": 32},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "mobile.json").write_text(json.dumps(config))
    arguments = (*SMALL, "--student.model", tmp_path / "mobile.json", "--data.path", data / "pairs", "--steps", 2)
    clipkd("train", *arguments, "--output", tmp_path / "run", "--optim.ema_momentum", 0.5)
    (tmp_path / "other.json").write_text(json.dumps(config).replace("resnet10t", "mobilenetv3_small_050"))
    refused = clipkd("train", *arguments, "--student.model", tmp_path / "other.json", check=False)
    assert (refused.returncode, "other: its towers do not run" in refused.stderr) == (2, True)
    clipkd("export", tmp_path / "run", "--output", tmp_path / "student")
    assert load_model(str(tmp_path / "student")).dim == 32


def test_damaged_samples_are_skipped_counted_and_above_a_share_end_the_run(
    clipkd: Run, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "pairs").mkdir()
    for shard in (data / "pairs").glob("*.tar"):
        content = bytearray(shard.read_bytes())
        places = [place for place in range(0, len(content), 512) if content[place : place + 8] == b"\x89PNG\r\n\x1a\n"]
        for place in places[::8]:
            content[place : place + 8] = b"no image"
        (tmp_path / "pairs" / shard.name).write_bytes(content)
    arguments = (*SMALL, "--data.path", tmp_path / "pairs", "--output", tmp_path / "run", "--steps", 8)
    clipkd("train", *arguments, "--data.max_skipped", 0.05, processes=2)
    rows = files.read_rows(tmp_path / "run" / "skipped.jsonl")
    assert {cause for row in rows for cause in row["counts"]} == {"undecodable image"}
    # Two epochs of 64 pairs of which 8 are damaged; a substitute may be damaged too.
    counted = sum(row["counts"]["undecodable image"] for row in rows)
    assert 16 <= counted == read_metrics(tmp_path / "run")[-1]["skipped"] <= 24
    assert all("tar/" in example["key"] for row in rows for example in row["examples"])

    stopped = clipkd("train", *arguments, "--output", tmp_path / "strict", "--data.max_skipped", 0, check=False)
    assert stopped.returncode == 1
    (checkpoint,) = (tmp_path / "strict" / "checkpoints").iterdir()
    for words in ("could not be used among the first", "data.max_skipped allows (0.0%)", f"(saved {checkpoint})"):
        assert words in stopped.stderr
    arguments += ("--output", tmp_path / "strict", "--data.max_skipped", 0.05, "--resume", "latest")
    assert "trained 8 steps" in clipkd("train", *arguments).stdout


def test_streamed_shards_that_are_not_there_end_the_run(clipkd: Run, data: Path, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes((data / "pairs" / "00000.tar").read_bytes())
    url = f"pipe:cat {tmp_path}/{{0..5}}.tar"
    arguments = (*SMALL, "--data.path", url, "--output", tmp_path / "run", "--steps", 20)
    done = clipkd("train", *arguments, check=False)
    assert done.returncode == 1
    assert "streamed shards could not be read to their end, more than data.max_skipped allows (1.0%)" in done.stderr
    arguments = ("--data.path", f"pipe:cat {data}/pairs/{{00000..00001}}.tar", "--output", tmp_path / "whole")
    whole = clipkd("train", *SMALL, *arguments, "--steps", 3, processes=2)
    assert "trained 3 steps" in whole.stdout
    state = json.loads((tmp_path / "whole" / "checkpoints" / "step_000003" / "state.json").read_text())
    assert state["stream"].keys() == {"0", "1"}
    assert state["streamed_shards"][1] == 0 < state["streamed_shards"][0]
