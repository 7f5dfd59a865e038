"""The model card's recipe and example code."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from clipkd.config.train import TrainConfig, to_dict
from clipkd.export.artefacts import write_formats
from clipkd.export.card import recipe
from clipkd.export.parity import run_snippet
from clipkd.export.probes import EXAMPLE_LABELS, write_example
from clipkd.export.snippets import snippet
from clipkd.inference.runtime import load_student
from tests.export.students import clip_student, siglip_student


def test_the_recipe_states_the_batch_over_all_processes_and_writes_the_configuration(tmp_path: Path) -> None:
    config = to_dict(TrainConfig()) | {"steps": 400, "batch_size": 64, "output": "runs/mine"}
    text = recipe(tmp_path, config, 300, {})
    assert "300 of 400 steps, batch 64 over all processes, seed 0" in text
    written = yaml.safe_load((tmp_path / "training.yaml").read_text())
    assert written == {key: value for key, value in config.items() if key not in ("output", "resume")}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_snippets_of_a_sigmoid_student_add_its_bias_once(kind: str, tmp_path: Path, siglip_folder: Path) -> None:
    student = clip_student(init_logit_bias=-2.5) if kind == "clip" else siglip_student(siglip_folder)
    assert write_formats(student, tmp_path, ("open_clip", "hf")) == {}
    write_example(tmp_path / "example.png")
    printed = {run_snippet(tmp_path, snippet(format, sigmoid=True)) for format in ("open_clip", "hf")}
    assert len(printed) == 1
    (text,) = printed
    loaded = load_student(f"local-dir:{tmp_path}", "torch")
    assert loaded.logit_bias is not None
    pixels = loaded.preprocess(Image.open(tmp_path / "example.png"))[None]
    logits = loaded.logit_scale * loaded.encode_pixels(pixels) @ loaded.encode_texts(EXAMPLE_LABELS).T
    expected = (1 / (1 + np.exp(-logits - loaded.logit_bias)))[0]
    assert re.findall(r"\d\.\d{3}", text or "") == [f"{each:.3f}" for each in expected]
