"""The options: their number, their errors, and what a saved configuration says."""

import ast
import dataclasses
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from clipkd.config import data as data_options
from clipkd.config import objective
from clipkd.config import terms as term_options
from clipkd.config import train as configuration
from clipkd.config.parse import parse
from clipkd.config.train import TrainConfig, save, to_dict
from clipkd.evaluation.tasks import load_task

ROOT = Path(__file__).parents[2]


def leaves(kind: Any, prefix: str = "") -> list[str]:
    """Dotted names of all options, from the annotations."""
    names: list[str] = []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            names += leaves(field.type, f"{prefix}{field.name}.")
        else:
            names.append(prefix + field.name)
    return names


def flatten(nested: dict[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for key, value in nested.items():
        names += flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return names


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that exits with status 2."""
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.endswith("\n")
    return printed.err


def test_there_are_at_most_80_options() -> None:
    """What many terms share (keys, queue, warm-up) is one option of the objective."""
    names = leaves(TrainConfig)
    assert sorted(names) == sorted(flatten(to_dict(TrainConfig())))
    assert len(names) <= 80


def test_every_option_is_explained_and_frozen() -> None:
    explained = 0
    modules = (configuration, data_options, objective, term_options)
    for module, node in [(m, node) for m in modules for node in ast.parse(inspect.getsource(m)).body]:
        if isinstance(node, ast.ClassDef):
            kind = getattr(module, node.name)
            assert kind.__dataclass_params__.frozen, node.name
            fields = [i for i, item in enumerate(node.body) if isinstance(item, ast.AnnAssign)]
            for i in fields:
                text = node.body[i + 1]
                assert isinstance(text, ast.Expr), f"{node.name}: {ast.unparse(node.body[i])}"
                assert isinstance(text.value, ast.Constant)
                assert len(text.value.value) >= 8
                explained += 1
    assert explained >= 80


def command_of(recipe: Path) -> list[str]:
    """The words of the command that a recipe opens with."""
    stated = re.match(r"(?:#.*\n)*?# Command:((?:.*\\\n)*.*)", recipe.read_text(encoding="utf-8"))
    assert stated, f"{recipe} does not open with its command"
    return shlex.split(stated[1].replace("\\\n#", " "))


def test_every_recipe_is_accepted_by_the_command_it_opens_with() -> None:
    recipes = sorted((ROOT / "configs").glob("**/*.yaml"))
    for path in recipes:
        words = command_of(path)
        arguments = words[words.index("train") + 1 :]
        assert arguments[0] == path.stem
        config = parse(["--config", str(path), *arguments[1:]])
        given = flatten(yaml.safe_load(path.read_text(encoding="utf-8")))
        assert given, path
        defaults = TrainConfig()
        assert any(value_of(config, option) != value_of(defaults, option) for option in given), path
    assert len(recipes) >= 11
    assert len([path for path in recipes if path.parent.name == "losses"]) >= 7


def value_of(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


EVERYTHING = shlex.split(
    "--output runs/x --steps 7 --batch_size 4 --seed 3 --precision bf16 --threads 2 --student.model tiny-student "
    "--teacher.models ViT-B-16@laion2b_s34b_b88k --data.format huggingface --data.path 'a b/ü' --data.min_crop 0.25 "
    "--data.num_workers 0 --objective.gkl.weight 0.5 --objective.keys student --objective.gkl.gamma 0 "
    "--objective.kl.weight 1e-3 --objective.features.weight 2000 "
    "--optim.betas '[0.8, 0.9]' --optim.learning_rate 5e-4 --evaluation.data '[one, two]' "
    "--log.trackers '[wandb, tensorboard]'"
)
TEACHER, SECOND, AVERAGE = "--teacher.models x", "--teacher.models x y", "--optim.ema_momentum 0.9"
KL = "--objective.kl.weight 1 --objective.keys student"
SEVERAL = f"--teacher.models x y@openai z {KL} --objective.logit_scale.teacher"
THREE_TEACHERS = [*SEVERAL.split(), "[70, 60, 50.5]"]
CLOSED_SET = [
    *f"{TEACHER} --data.label_key cls --objective.closed_set.weight 2 --objective.closed_set.classes imagenet".split(),
    *("--objective.closed_set.templates", "['a {c}: ü.', '{c}']"),
    *["--objective.logit_scale.teacher", "100", "--objective.logit_scale.init", "14.3"],
]


@pytest.mark.parametrize(
    "arguments",
    [[], EVERYTHING, THREE_TEACHERS, CLOSED_SET],
    ids=["defaults", "everything", "three teachers", "closed set"],
)
def test_a_saved_configuration_is_read_back_equal(tmp_path: Path, arguments: list[str]) -> None:
    config = parse(arguments)
    save(config, tmp_path / "config.yaml")
    assert parse(["--config", str(tmp_path / "config.yaml")]) == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8")) == to_dict(config)


def test_options_arrive_with_their_values_and_types() -> None:
    config = parse(EVERYTHING)
    assert (config.steps, config.seed, config.threads, config.precision) == (7, 3, 2, "bf16")
    assert config.data.path == "a b/ü"
    assert config.objective.gkl.gamma == 0.0
    assert isinstance(config.objective.gkl.gamma, float)
    assert config.objective.kl.weight == 0.001
    assert config.evaluation.data == ("one", "two")
    assert config.log.trackers == ("wandb", "tensorboard")
    assert parse([]) == TrainConfig()
    config = parse(["--optim.betas", "0.8", "0.9", "--evaluation.data", "one", "two"])
    assert (config.optim.betas, config.evaluation.data) == ((0.8, 0.9), ("one", "two"))
    config = parse(THREE_TEACHERS)
    assert config.teacher.models == config.teacher.names == ("x", "y@openai", "z")
    assert parse(["--teacher.models", "x", "--objective.kl.weight", "1"]).teacher.names == ("x",)
    assert config.objective.logit_scale.teacher == (70.0, 60.0, 50.5)
    config = parse(CLOSED_SET)
    assert config.objective.closed_set.templates == ("a {c}: ü.", "{c}")
    assert config.objective.logit_scale.teacher == 100.0
    assert isinstance(config.objective.logit_scale.teacher, float)


@pytest.mark.parametrize(
    ("arguments", "terms"),
    [
        ("", ["info_nce"]),
        ("--objective.info_nce.weight 0 --objective.sigmoid.weight 1", ["sigmoid"]),
        (f"--objective.info_nce.weight 0 --objective.itc.weight 1 {AVERAGE}", ["itc"]),
        (f"--objective.itc.weight 1 --objective.queue 4 {AVERAGE}", ["info_nce", "itc"]),
    ],
)
def test_some_objectives_need_no_teacher(arguments: str, terms: list[str]) -> None:
    config = parse(arguments.split())
    assert config.teacher.names == ()
    assert list(config.objective.active()) == terms


def test_a_teacher_without_a_distillation_term_gets_the_gkl_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    teacher = TEACHER.split()
    config = parse(teacher)
    assert list(config.objective.active()) == ["info_nce", "gkl"]
    assert config.objective.gkl == parse([*teacher, "--config", str(ROOT / "configs/losses/gkl.yaml")]).objective.gkl
    assert capsys.readouterr().err.startswith("clipkd train: no distillation term is named")
    assert list(parse([*teacher, "--objective.features.weight", "1"]).objective.active()) == ["info_nce", "features"]
    assert parse([*teacher, "--objective.gkl.gamma", "0.5"]).objective.gkl.gamma == 0.5
    alone = parse([*teacher, "--data.caption_key", "null", "--student.text", "teacher"])
    assert list(alone.objective.active()) == ["gkl"]  # info_nce needs captions


def test_help_has_a_short_usage_and_lists_every_option_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    usage, text = capsys.readouterr().out.split("\n\n", 1)
    assert len(usage.splitlines()) <= 2
    shown = re.findall(r"^  --([\w.]+)", text, re.M)
    assert sorted(shown) == sorted(["config", "print_config", *leaves(TrainConfig)])


def test_later_files_and_then_the_command_line_win(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("steps: 1\nbatch_size: 8\noptim: {warmup_steps: 5, betas: [0.5, 0.9]}\n")
    (tmp_path / "b.yaml").write_text("batch_size: 16\noptim: {betas: [0.6, 0.9]}\n")
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")]
    config = parse([*files, "--optim.warmup_steps", "9"])
    assert (config.steps, config.batch_size, config.optim.warmup_steps, config.optim.betas) == (1, 16, 9, (0.6, 0.9))


@pytest.mark.parametrize(
    ("given", "wrong", "meant"),
    [
        ("objectve:\n  gkl: {weight: 1}\n", "objectve", "'objective"),
        ("objective:\n  gkl: {weigth: 1}\n", "gkl.weigth", "'objective.gkl.weight'"),
        ("batchsize: 3\n", "batchsize", "'batch_size'"),
        (["--batchsize=3"], "batchsize", "'batch_size'"),
        (["--steps", "3", "--objectiv.gkl.gamma", "1"], "objectiv.gkl.gamma", "'objective.gkl.gamma'"),
        (["--optim.warmup", "3"], "optim.warmup", "'optim.warmup_steps'"),  # abbreviated
        (["--zzz", "1"], "zzz", None),
    ],
)
def test_an_unknown_option_is_named_with_the_nearest_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str | list[str], wrong: str, meant: str | None
) -> None:
    if isinstance(given, str):
        (tmp_path / "typo.yaml").write_text(given)
        given = ["--config", str(tmp_path / "typo.yaml")]
    line = refused(given, capsys)
    assert wrong in line
    assert (f"did you mean {meant}" if meant else "lists the options") in line
    assert ("did you mean" in line) == (meant is not None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--steps 0", ["steps is 0"]),
        ("--micro_batches 9 --batch_size 8", ["micro_batches is 9", "no more than batch_size, 8"]),
        ("--objective.tile_size 0", ["objective.tile_size is 0"]),
        ("--steps many", ["steps", "many"]),
        ("--batch_size 1", ["batch_size is 1", "at least 2"]),
        ("--seed -1", ["seed is -1"]),
        ("--data.min_crop 0", ["data.min_crop is 0"]),
        ("--data.num_workers -1", ["data.num_workers is -1"]),
        ("--objective.gkl.temperature 0", ["objective.gkl.temperature is 0"]),
        ("--objective.gkl.gamma -0.1", ["objective.gkl.gamma is -0.1"]),
        ("--objective.keys both", ["objective.keys", "both", "student", "teacher"]),
        ("--objective.gkl.weight 1", ["objective.gkl", "teacher.models"]),
        ("--objective.kl.weight -1 --teacher.models x", ["objective.kl.weight is -1"]),
        ("--objective.info_nce.weight 0", ["no loss term", "objective.info_nce.weight"]),
        ("--student.text frozen", ["student.text is frozen at random", "NAME@WEIGHTS"]),
        ("--student.text teacher", ["student.text is teacher", "teacher.models"]),
        ("--objective.kl.weight .nan", ["objective.kl.weight is nan"]),
        ("--objective.warmup_steps -1", ["objective.warmup_steps is -1"]),
        ("--objective.gkl.ce_weight -1", ["objective.gkl.ce_weight", "-1"]),
        (
            "--objective.itc.momentum_share 0.7 --objective.itc.teacher_share 0.6",
            ["objective.itc.momentum_share and teacher_share are 0.7 and 0.6", "1"],
        ),
        ("--data.caption_key null", ["objective.info_nce needs captions", "caption_key is null"]),
        (
            "--data.caption_key null --objective.info_nce.weight 0 --objective.kl.weight 1 --teacher.models x",
            ["data.caption_key is null, so no text tower can learn"],
        ),
        ("--student.image head", ["student.image is head at random", "student.image_weights"]),
        ("--student.image_weights teacher", ["student.image_weights is teacher", "teacher.models names none"]),
        ("--optim.layer_decay 0", ["optim.layer_decay is 0"]),
        (f"--objective.itc.weight 1 --objective.itc.teacher_share 0.5 {AVERAGE}", ["objective.itc", "teacher.models"]),
        ("--objective.itc.weight 1", ["objective.itc", "optim.ema_momentum is 0"]),
        (f"{TEACHER} {KL} --objective.queue 4", ["objective.kl", "optim.ema_momentum is 0"]),
        ("--objective.queue 4", ["objective.queue is 4", "no term"]),
        ("--objective.queue -1", ["objective.queue is -1"]),
        (f"{TEACHER} --objective.closed_set.weight 1", ["objective.closed_set.classes is empty", "imagenet"]),
        (
            f"{TEACHER} --objective.closed_set.weight 1 --objective.closed_set.classes imagenet",
            ["objective.closed_set.class_prior", "data.label_key"],
        ),
        (
            "--objective.closed_set.templates \"['a {c}.', 'a cat.']\"",
            ["objective.closed_set.templates", "'a cat.'", "{c}"],
        ),
        ("--objective.logit_scale.maximum 0.5", ["objective.logit_scale.maximum is 0.5"]),
        ("--objective.logit_scale.init 101", ["objective.logit_scale.init is 101", "1 and maximum, 100"]),
        ("--objective.logit_scale.teacher -1", ["objective.logit_scale.teacher is -1"]),
        (f"{SEVERAL} '[70, 60]'", ["objective.logit_scale.teacher lists (70.0, 60.0)", "teachers, 3 here"]),
        ("--optim.betas '[0.9, 1.0]'", ["optim.betas is [0.9, 1.0]"]),
        (f"{SECOND} --objective.gkl.weight 1", ["objective.gkl learns from one teacher", "use kl"]),
        (f"{SECOND} --objective.kl.weight 1", ["objective.kl learns from one teacher", "objective.keys student"]),
        (f"{SECOND} {KL} --objective.queue 4 {AVERAGE}", ["objective.kl learns from one teacher", "no queue"]),
        ("--objective.logit_scale.teacher 50", ["objective.logit_scale.teacher is 50", "no term"]),
        (
            f"{TEACHER} {KL} --objective.soft_bce.weight 1 --objective.logit_scale.teacher student",
            ["objective.logit_scale.teacher is student", "objective.soft_bce"],
        ),
        ("--objective.xrd.weight 1 --teacher.models x", ["objective.xrd", "objective.icl.weight"]),
        ("--data.label_key cls", ["data.label_key is cls", "objective.closed_set"]),
        ("--optim.learning_rate 0", ["optim.learning_rate is 0"]),
        ("--optim.ema_momentum 1", ["optim.ema_momentum is 1"]),
        ("--optim.clip_norm -1", ["optim.clip_norm is -1"]),
        ("--checkpoint.every_steps 0", ["checkpoint.every_steps is 0"]),
        ("--log.trackers '[trackio]'", ["log.trackers", "trackio"]),
        ("--config no/such.yaml", ["no/such.yaml"]),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(
    capsys: pytest.CaptureFixture[str], arguments: str, words: list[str]
) -> None:
    line = refused(shlex.split(arguments), capsys)
    assert line.startswith("clipkd train: error: ")
    assert [word for word in words if word not in line] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: [\n", "is not YAML"),
        ("- steps\n", "holds no options"),
        ("just text\n", "holds no options"),
        ("seed: 1\nsteps: many\n", "line 2: steps is 'many'; it must be a whole number"),
        ("optim: 3\n", "line 1: optim is '3'; its options stand below it"),
        ("optim:\n  betas: [0.9]\n", "line 2: optim.betas is a list; it must be a list of 2"),
        (
            "data: {image_column: ~}\n",
            "line 1: data.image_column is '~'; it must be a word; if it is one, write it in quotes",
        ),
        ("teacher: {models: [~]}\n", "teacher.models is '~'; it must be a word; if it is one, write it in quotes"),
        ("precision: 16\n", "precision is '16'; it must be one of auto, fp32, bf16, fp16"),
        ("steps: 1\nsteps: 2\n", "line 2: steps stands twice"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    line = refused(["--config", str(tmp_path / "broken.yaml")], capsys)
    assert "broken.yaml" in line
    assert words in line


BITES = ["no", "on", "017", "12:30", "1e5", "2024-01-01", "0x10", ".nan", "1_000", "=", "ü😀"]
"""Words that YAML takes for something else."""


def test_words_of_a_file_stay_words(tmp_path: Path) -> None:
    words, file = f"[{', '.join(BITES)}]", tmp_path / "words.yaml"
    for word in BITES:
        file.write_text(f"output: {word}\noptim:\ndata:\n  caption_key: {word}\n  mix: [{{path: {word}}}]\n")
        config = parse(["--config", str(file)])
        assert (config.output, config.data.caption_key, config.data.mix[0].path) == (word, word, word)
        assert config.optim == TrainConfig().optim  # an empty section
    file.write_text(f"data: {{path: {words}}}\nsteps: 1e3\noptim.learning_rate: 5e-4\nobjective: {{queue: 010}}\n")
    config = parse(["--config", str(file), "--objective.queue", "0"])
    assert (config.data.path, config.steps, config.optim.learning_rate) == (tuple(BITES), 1000, 5e-4)
    file.write_text(f"name: 017\nclassnames: {words}\ntemplates: ['{{c}}']\nchance: 1e-1\nnum_images: ~\n")
    task = load_task(file)
    assert (task.name, task.classnames, task.chance, task.num_images) == ("017", tuple(BITES), 0.1, None)
