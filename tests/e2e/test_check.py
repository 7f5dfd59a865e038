"""`clipkd check` describes the run, names every problem at once and writes nothing."""

from pathlib import Path

from tests.e2e.conftest import SMALL, Run


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".npz"}


def test_it_says_what_will_run_and_writes_nothing(clipkd: Run, data: Path, teacher: Path, tmp_path: Path) -> None:
    before = tree(data) | tree(teacher.parent)
    arguments = [*SMALL, "--data.path", data / "pairs", "--steps", 8, "--output", tmp_path / "run"]
    arguments += ["--teacher.models", teacher, "--objective.gkl.weight", 1, "--evaluation.data", f"[{data / 'noto'}]"]
    done = clipkd("check", *arguments, "--objective.queue", 2)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["data", "64", "pairs"]
    (batch,) = [line for line in lines if line.startswith("batch")]
    assert batch.split(maxsplit=1)[1] == "16 pairs = 1 × 16; 8 steps see 128 = 2 epochs of 64 pairs, 4.0 steps each"
    for topic in ("student", "teacher", "memory", "loss", "step"):
        assert any(line.startswith(topic) for line in lines), topic
    assert "0.12M image + 3.22M text parameters" in done.stdout  # as `models` counts the demo's student
    assert "16 × 48 logits, 16 rows at a time" in done.stdout
    assert "finds the right caption for" in done.stdout
    assert not (tmp_path / "run").exists()
    assert tree(data) | tree(teacher.parent) == before


def test_two_processes_speak_with_one_voice(clipkd: Run, data: Path, tmp_path: Path) -> None:
    arguments = (*SMALL, "--data.path", data / "pairs", "--steps", 8, "--output", tmp_path / "run")
    done = clipkd("check", *arguments, processes=2)
    assert done.stdout.count("16 pairs = 2 × 8") == 1
    assert done.stdout.count("images/s") == 1
    refused = clipkd("check", *arguments, "--data.path", tmp_path / "none", processes=2, check=False)
    assert refused.returncode == 2
    assert refused.stderr.count("no shard") == 1


def test_every_problem_is_named_not_only_the_first(clipkd: Run, data: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "steps: 0\nbatch_size: 0\nthreads: 0\noptim: {clip_norm: -1, warmup_steps: -2}\n"
    )
    (tmp_path / "run").write_text("a file")
    arguments = ("--data.path", tmp_path / "none", "--student.model", "ViT-XX", "--output", tmp_path / "run")
    models = ("--teacher.models", "local-dir:nowhere", "--objective.gkl.weight", 1, "--evaluation.data", "[/no/set]")
    done = clipkd("check", tmp_path / "recipe.yaml", *arguments, *models, "--precision", "fp16", check=False)
    assert done.returncode == 2
    problems = [line.removeprefix("clipkd check: problem: ") for line in done.stderr.splitlines()]
    for words in (
        *("steps is 0", "batch_size is 0", "threads is 0", "optim.clip_norm is -1", "optim.warmup_steps is -2"),
        *("micro_batches is 1; it must be 1 or more, and no more than batch_size, 0", "precision is fp16", "ViT-XX"),
        *("no folder nowhere", "no shard", "/no/set", "is a file; name a folder"),
    ):
        assert sum(words in problem for problem in problems) == 1, words
    assert len(problems) == 12


def test_damage_and_a_teacher_that_knows_nothing_are_noted(
    clipkd: Run, data: Path, clip_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "pairs").mkdir()
    for number, shard in enumerate(sorted((data / "pairs").glob("*.tar"))):
        content = shard.read_bytes()
        (tmp_path / "pairs" / shard.name).write_bytes(content[: len(content) // 2] if number else content)
    arguments = (*SMALL, "--data.path", tmp_path / "pairs", "--steps", 4, "--output", tmp_path / "run")
    refused = clipkd("check", *arguments, check=False)
    assert (refused.returncode, "1 of 2 shards are damaged" in refused.stderr) == (2, True)
    random = ("--teacher.models", clip_folder, "--objective.kl.weight", 1, "--data.max_skipped", 0.5)
    done = clipkd("check", *arguments, *random)
    notes = [line for line in done.stdout.splitlines() if line.startswith("note")]
    assert any("damaged shard" in note and "00001.tar" in note for note in notes)
    assert any("hardly finds any caption" in note for note in notes)
    assert "sees its own size (48, 48) (student (32, 32))" in done.stdout


def test_a_dry_step_reports_what_it_finds_and_leaves_nothing(clipkd: Run, data: Path, tmp_path: Path) -> None:
    arguments = (*SMALL, "--data.path", data / "pairs", "--steps", 2, "--output", tmp_path / "run")
    clipkd("train", *arguments)
    before = tree(tmp_path / "run")
    done = clipkd("check", *arguments, "--resume", "latest")
    assert "nothing left to do: 2 of 2 steps are done" in done.stdout
    overflow = ("--steps", 4, "--optim.learning_rate", "1e30", "--optim.clip_norm", 0)
    wild = clipkd("check", *arguments, *overflow, "--output", tmp_path / "other", check=False)
    assert wild.returncode == 2
    assert "is nan" in wild.stderr or "is inf" in wild.stderr
    assert "its batch begins with" in wild.stderr
    assert not (tmp_path / "other").exists()
    assert tree(tmp_path / "run") == before
