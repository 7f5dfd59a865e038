"""The files on this machine that hold a model's weights, without loading them."""

from pathlib import Path

from clipkd.models import run_folder
from clipkd.models.onnx_student import SUFFIXES

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".onnx")


def weight_files(model: str) -> list[Path]:
    """Weight files of a model as `load_model` takes it; none for a name that a hub resolves, or a folder that is gone."""
    name, _, weights = model.partition("@")
    if weights:
        return [Path(weights)] if Path(weights).is_file() else []
    kind, _, rest = name.partition(":")
    folder = Path(rest if kind in ("local-dir", "hf", *SUFFIXES) else name)
    if not folder.is_dir():
        return []
    if run_folder.is_run(folder):
        return [run_folder.resolve(folder) / "model.safetensors"]
    return sorted(
        path for place in (folder, folder / "onnx") for path in place.glob("*") if path.suffix in WEIGHT_SUFFIXES
    )
