"""Task files, their data folders, and the data that a task refuses."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest

from clipkd.evaluation.subjects import Subject, open_subject, open_subjects
from clipkd.evaluation.tasks import METRICS, Task, find_data, find_task_files, load_task
from clipkd.models.imagenet import imagenet_prompts, imagenet_synsets
from tests.data.samples import picture_rows, plain_png, write_benchmark

FILES = sorted((Path(__file__).parents[2] / "eval" / "tasks").glob("*.yaml"))
IMAGENET = Task(prompts="imagenet")  # layout and split follow from the folders
ROWS = {"layout": "huggingface", "classnames": ("a", "b"), "templates": ("{c}",)}


def benchmark(root: Path, *contents: str, extension: str = "cls") -> Path:
    """Three classes, or captions, in CLIP_benchmark's layout."""
    parts = [((f"s{n}.{extension}", text.encode()), (f"s{n}.png", plain_png(n))) for n, text in enumerate(contents)]
    kind = "retrieval" if extension == "txt" else ""
    return write_benchmark(root, [*sum(parts, ())], classnames="cat\ndog\neel\n", templates="a {c}\n", kind=kind)


def class_folders(root: Path, names: Iterable[str]) -> Path:
    """One image in each; what it shows does not matter here."""
    for name in names:
        (root / "val" / name).mkdir(parents=True)
        (root / "val" / name / f"of {name}.png").touch()
    return root


def stored(path: Path, column: str, values: list[Any], feature: Any) -> Path:
    picture_rows([0] * len(values), features={column: feature}, **{column: values}).save_to_disk(str(path))
    return path


def task_file(folder: Path, stem: str, name: str) -> str:
    (folder / f"{stem}.yaml").write_text(f"name: {name}\n")
    return str(folder / f"{stem}.yaml")


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {file.stem: load_task(file) for file in FILES}


def test_every_task_file_loads_under_a_name_of_its_own(tasks: dict[str, Task]) -> None:
    for field in ("name", "title"):
        assert len({getattr(task, field) for task in tasks.values()}) == len(tasks) == 55
    assert [stem for stem, task in tasks.items() if task.name is None] == ["webdataset"]  # for any folder
    assert find_task_files(("all",)) == find_task_files((str(FILES[0].parent),)) == FILES


def test_every_task_is_found_by_its_name_and_by_its_files_name(tasks: dict[str, Task]) -> None:
    for file in FILES:
        name = tasks[file.stem].name
        assert find_task_files(tuple(filter(None, (name, file.stem)))) == [file] * (2 if name else 1)
    with pytest.raises(ValueError, match=r"no file, folder or task 'imagenet2k' \(did you mean .*imagenet1k"):
        find_task_files(("imagenet2k",))


def test_a_task_files_metric_and_chance_belong_to_its_kind(tasks: dict[str, Task]) -> None:
    for stem, task in tasks.items():
        if stem == "webdataset":
            continue
        assert task.metric in METRICS[task.kind or "classification"], stem
        of = {"classification": task.num_classes, "retrieval": task.num_images, "pairs": 2}.get(str(task.kind))
        assert task.chance == (pytest.approx(1 / of, abs=5.1e-5) if of else None), stem  # four decimals
        assert (task.num_images is None, task.num_captions is None) == (False, task.kind != "retrieval"), stem
        assert (task.num_classes is None) == (task.kind not in ("classification", "multilabel")), stem
    with pytest.raises(ValueError, match=r"'a \{\}' has no \{c\}"):
        Task(templates=("{c}", "a {}"))
    with pytest.raises(ValueError, match=r"metric is 'acc1'; choose from \['acc'\]"):
        Task(kind="pairs", metric="acc1")


def test_without_a_file_the_data_folder_says_what_it_is(tmp_path: Path) -> None:
    subject = open_subject(load_task(None), benchmark(tmp_path / "captioned", "a\nb", "c", "d", "e", extension="txt"))
    assert (subject.name, subject.data.kind, subject.metric) == ("captioned", "retrieval", "mean_recall@1")
    assert subject.chance == 1 / 4
    subject = open_subject(load_task(None), benchmark(tmp_path / "classes", "0", "2"))
    assert (subject.name, subject.data.kind, subject.metric) == ("classes", "classification", "acc1")
    assert subject.chance == 1 / 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_images": 3}, "2 images; the task expects 3"),
        ({"num_classes": 1000}, "3 classes; the task expects 1000"),
        ({"kind": "retrieval", "num_captions": 10}, "4 captions; the task expects 10"),
        ({"metric": "acc5"}, "3 classes, too few for the metric acc5"),
        ({"metric": "acc"}, "a classification task; its metrics are"),
    ],
)
def test_data_that_differ_from_their_task_are_refused_with_both_numbers(
    tmp_path: Path, options: Any, words: str
) -> None:
    captioned = options.get("kind") == "retrieval"
    contents, extension = (["a\nb\nc", "d"], "txt") if captioned else (["0", "1"], "cls")
    root = benchmark(tmp_path / "x", *contents, extension=extension)
    with pytest.raises(ValueError, match=rf"x (has|holds) {words}"):
        open_subject(Task(**options), root)
    right = {"num_images": 2, "num_classes": 3, "num_captions": 4, "metric": None}
    assert len(open_subject(Task(**{name: right.get(name, value) for name, value in options.items()}), root).data) == 2


def test_the_tasks_prompts_come_before_those_of_the_data(tmp_path: Path) -> None:
    root = benchmark(tmp_path / "x", "0", "2")
    plain = open_subject(Task(), root)
    assert (plain.data.classnames, plain.data.templates) == (["cat", "dog", "eel"], ["a {c}"])
    own = open_subject(Task(classnames=("a", "b", "c", "d"), templates=("{c}!", "{c}?")), root)
    assert (own.data.classnames, own.data.templates, own.data.num_classes) == (list("abcd"), ["{c}!", "{c}?"], 4)
    assert own.prompts_sha256() != plain.prompts_sha256()
    assert own.data.sha256 == plain.data.sha256
    with pytest.raises(ValueError, match=r"0\.tar: sample 0/s1 has label 2, outside the 2 class names"):
        open_subject(Task(classnames=("a", "b")), root)


def shown(subject: Subject) -> dict[str, str]:
    """Folder of each image → the class name of its label."""
    assert subject.data.classnames is not None
    folders = [picture.key.split("/")[0] for picture in subject.data.pictures]
    return {name: subject.data.classnames[label] for name, label in zip(folders, subject.data.labels, strict=True)}


def test_folders_named_by_synset_get_their_imagenet_names(tmp_path: Path) -> None:
    synsets = imagenet_synsets()
    chosen = [synsets[number] for number in (0, 281, 657, 744, 999)]
    subject = open_subject(IMAGENET, class_folders(tmp_path, chosen))
    assert chosen[:2] == ["n01440764", "n02123045"]
    names = ["tench", "tabby cat", "missile", "missile", "toilet paper"]
    assert shown(subject) == dict(zip(chosen, names, strict=True))
    assert (subject.data.classnames, subject.data.num_classes) == (names, 5)
    templates = subject.data.templates or []
    assert (len(templates), templates[0]) == (80, "a bad photo of a {c}.")
    data = open_subject(Task(prompts="imagenet", num_classes=1000), benchmark(tmp_path / "all", "2", "0")).data
    assert (data.labels, data.classnames) == ([2, 0], imagenet_prompts()[0])  # no folders: all thousand


def test_folders_named_by_number_are_taken_in_imagenets_order(tmp_path: Path) -> None:
    names = imagenet_prompts()[0]
    subject = open_subject(IMAGENET, class_folders(tmp_path, map(str, range(1000))))  # "10" sorts before "2"
    assert shown(subject) == {str(number): name for number, name in enumerate(names)}
    assert (subject.data.classnames, subject.data.folders) == (names, [str(number) for number in range(1000)])
    mixed = open_subject(IMAGENET, class_folders(tmp_path / "mixed", ["281", "0999", "n01440764", "30"]))
    expected = {"n01440764": "tench", "30": "American bullfrog", "281": "tabby cat", "0999": "toilet paper"}
    assert (shown(mixed), mixed.data.classnames) == (expected, list(expected.values()))


@pytest.mark.parametrize("name", ["n00000001", "tench", "1000", "-1", "00"])
def test_a_folder_that_is_no_class_of_imagenet_or_one_twice_is_refused(tmp_path: Path, name: str) -> None:
    alone = rf"the folder '{name}' \(1 such\) is no synset id of ImageNet-1k"
    with pytest.raises(ValueError, match="stand for the same ImageNet class" if name == "00" else alone):
        open_subject(IMAGENET, class_folders(tmp_path, ["n01440764", name]))


def test_class_folders_need_names_and_templates_from_somewhere(tmp_path: Path) -> None:
    root = class_folders(tmp_path, ["a", "b"])
    task = {"layout": "imagefolder", "split": "val"}
    with pytest.raises(ValueError, match="names no classes; set prompts: imagenet or classnames"):
        open_subject(Task(**task), root)
    with pytest.raises(ValueError, match=r"no templates; set templates in the task, such as \['a photo"):
        open_subject(Task(**task, classnames=("a", "b")), root)
    with pytest.raises(ValueError, match="2 class folders, the task 3 class names"):
        open_subject(Task(**task, classnames=("a", "b", "c"), templates=("{c}",)), root)
    assert shown(open_subject(Task(**task, classnames=("x", "y"), templates=("{c}",)), root)) == {"a": "x", "b": "y"}


def test_class_names_of_hugging_face_rows_may_come_from_the_task(tmp_path: Path) -> None:
    root = stored(tmp_path / "cats", "y", [1, 0, 1], datasets.Value("int64"))
    subject = open_subject(Task(**ROWS, label_column="y"), root)
    assert (subject.data.labels, subject.data.classnames, subject.name) == ([1, 0, 1], ["a", "b"], "cats")
    for options, column in (({}, "label"), ({"kind": "retrieval"}, "caption"), ({"image_column": "picture"}, "image")):
        with pytest.raises(ValueError, match=rf"has no column .*\['image', 'y'\]; set {column}_column"):
            open_subject(Task(**ROWS, **options), root)
    for wrong in (2, -1, None):
        path = stored(tmp_path / str(wrong), "label", [0, wrong], datasets.Value("int64"))
        with pytest.raises(ValueError, match=f"{wrong}: sample row 1 has label {wrong}, outside the 2 class names"):
            open_subject(Task(**ROWS), path)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("vtab/caltech101", "wds_vtab-caltech101_test"),  # DataComp
        ("vtab/caltech101", "wds_vtab-caltech101"),  # CLIP_benchmark
        ("fairness/geode", "geode"),
        ("some/name", "wds_stem_test"),
        (None, "stem"),
    ],
)
def test_data_are_found_by_the_names_that_others_give_them(tmp_path: Path, name: str | None, folder: str) -> None:
    task, file = Task(name=name), tmp_path / "stem.yaml"
    (tmp_path / folder).touch()  # a file is no data folder
    assert find_data(task, file, str(tmp_path)) is None
    (tmp_path / folder).unlink()
    (tmp_path / folder).mkdir()
    assert find_data(task, file, str(tmp_path)) == str(tmp_path / folder)


def test_several_tasks_share_a_folder_of_data_folders(tmp_path: Path) -> None:
    root = tmp_path / "data"
    files = [task_file(tmp_path, stem, f"vtab/{stem}") for stem in "abc"]
    benchmark(root / "wds_vtab-a_test", "0", "1")
    with pytest.raises(FileNotFoundError, match=r"no data folder for vtab/b, vtab/c \(2 of 3 tasks\)"):
        open_subjects(tuple(files), (str(root),))
    (subject,) = open_subjects(tuple(files), (str(root),), skip_missing=True)
    assert (subject.name, subject.data.labels) == ("vtab/a", [0, 1])
    with pytest.raises(
        FileNotFoundError, match=r"data has no data folder for vtab/b, vtab/c \(2 of 2 tasks\); eval/README"
    ):
        open_subjects(tuple(files[1:]), (str(root),), skip_missing=True)
    benchmark(root / "b", "2")
    benchmark(root / "c", "1")
    task_file(tmp_path, "any", "null")  # fits any data, and is left out without a folder of its name
    found = open_subjects((str(tmp_path),), (str(root),))  # all YAMLs of a folder
    labels = {"vtab/a": [0, 1], "vtab/b": [2], "vtab/c": [1]}
    assert {subject.name: subject.data.labels for subject in found} == labels
    benchmark(root / "any", "1")
    assert len(open_subjects((str(tmp_path),), (str(root),))) == 4
    with pytest.raises(ValueError, match="several tasks take one data folder"):
        open_subjects((str(tmp_path),), (str(root), str(root)))


def test_one_task_takes_its_data_folder_or_the_folder_above(tmp_path: Path) -> None:
    file = task_file(tmp_path, "a", "vtab/a")
    root = benchmark(tmp_path / "data" / "wds_vtab-a", "0")
    for data in (root, root.parent):
        (subject,) = open_subjects((file,), (str(data),))
        assert (subject.name, subject.data.root) == ("vtab/a", str(root))


def test_a_folder_with_a_common_name_is_called_after_its_parent_too(tmp_path: Path) -> None:
    roots = [str(benchmark(tmp_path / name, "0")) for name in ("a/zeroshot", "b/zeroshot", "pets")]
    assert [subject.name for subject in open_subjects((), tuple(roots))] == ["a/zeroshot", "b/zeroshot", "pets"]


def test_two_of_one_name_no_data_and_missing_task_files_are_refused(tmp_path: Path) -> None:
    files = tuple(task_file(tmp_path, stem, "same") for stem in "ab")
    root = str(benchmark(tmp_path / "same", "0"))
    for tasks, roots in ((files, (str(tmp_path),)), ((), (root, root))):
        with pytest.raises(ValueError, match="two tasks or data folders are called 'same'"):
            open_subjects(tasks, roots)
    with pytest.raises(ValueError, match="data is empty; name a data folder"):
        open_subjects(files, ())
    for path in (tmp_path / "none.yaml", tmp_path / "same"):  # a folder without any
        with pytest.raises(ValueError, match=f"no file, folder or task '{path}'; `clipkd eval ls` lists"):
            find_task_files((str(path),))
