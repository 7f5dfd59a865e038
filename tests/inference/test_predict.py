"""Parts of `clipkd predict`: probabilities, images of a folder, the index, options that take several words."""

import math
import os
from pathlib import Path

import numpy as np
import pytest

from clipkd.config.parse import parse_into
from clipkd.inference import images
from clipkd.inference.index import Entry, Index, read_stamp
from clipkd.inference.predict import PredictConfig, probabilities
from tests.data.samples import plain_png


def test_probabilities_by_hand() -> None:
    cosines = np.array([[1.0, 0.0], [0.0, 0.0]], np.float32)
    found = probabilities(cosines, logit_scale=math.log(3), logit_bias=None)
    assert found == pytest.approx(np.array([[0.75, 0.25], [0.5, 0.5]]))
    found = probabilities(cosines, logit_scale=math.log(9), logit_bias=-math.log(3))
    assert found == pytest.approx(np.array([[0.75, 0.25], [0.25, 0.25]]))
    large = np.array([[1.0, -1.0]], np.float32)  # exp of the logits would overflow
    assert probabilities(large, logit_scale=5000.0, logit_bias=None).tolist() == [[1.0, 0.0]]


def test_images_are_found_once_in_order_and_the_rest_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images_here = ("b/no ending", "b/2.PNG", "b/1.jpeg", "a/x.tiff", "c.webp")
    for name in (*images_here, ".hidden/y.png", "b/.z.png", "b/@eaDir/a.jpg", "b/notes.txt", "b/c.jpg.bak"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "no ending").write_bytes(plain_png(0))
    os.mkfifo(tmp_path / "b" / "pipe")
    (tmp_path / "b" / "up").symlink_to(tmp_path)  # a loop
    named = tmp_path / "b" / "notes.txt"
    found = images.find_images([str(named), str(tmp_path), str(tmp_path / "c.webp")])
    assert list(found) == [str(named), *(str(tmp_path / name) for name in reversed(images_here))]
    assert [path for path, itself in found.items() if itself] == [str(named), str(tmp_path / "c.webp")]
    assert "left out: 3 × hidden (" in (said := capsys.readouterr().err)
    assert f"2 × no image ({tmp_path}/b/c.jpg.bak)" in said


def test_two_processes_add_to_one_index(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for path in paths:
        Path(path).touch()
    indices = [Index.read(tmp_path / "index.npz", "model") for _ in paths]  # both before either has written
    for index, path in zip(indices, paths, strict=True):
        index.write({path: Entry(read_stamp(path), np.ones(2, np.float32))})
    assert list(Index.read(tmp_path / "index.npz", "model").entries) == paths


def test_features_that_are_not_finite_are_named() -> None:
    features = np.array([[1, 2], [3, np.inf]], np.float32)
    with pytest.raises(ValueError, match=r"the features of b\.png are not finite"):
        images.require_finite(features, ["a.png", "b.png"])
    images.require_finite(features[:1], ["a.png"])


def read(*arguments: str) -> PredictConfig:
    return parse_into(PredictConfig, list(arguments), "predict", "", positional=("model", "images"))


def test_positional_images_and_labels_take_one_or_several_words() -> None:
    config = read("DIR", "a.jpg", "--labels", "a cat")
    assert (config.model, config.images, config.labels) == ("DIR", ("a.jpg",), ("a cat",))
    config = read("DIR", "1", "true", "x: y", "--labels", "no", "2", "a, b", "{c}: d", "--batch-size", "3", "--json")
    assert config.images == ("1", "true", "x: y")
    assert config.labels == ("no", "2", "a, b", "{c}: d")
    assert (config.batch_size, config.json) == (3, True)
    assert read("DIR", "a", "--labels", "[a, b c]").labels == ("a", "b c")
    assert read("DIR", "--top", "3", "a", "--query", "a: b").query == "a: b"


@pytest.mark.parametrize("arguments", [[], ["DIR", "--query", "x"], ["DIR", "a", "--labels"]])
def test_missing_arguments_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        read(*arguments)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
