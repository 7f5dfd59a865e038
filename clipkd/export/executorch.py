"""The two towers as ExecuTorch programs for phones: one input at a time, on the XNNPACK kernels."""

from pathlib import Path

import torch

from clipkd import files
from clipkd.export.onnx import TextTower, VisionTower, describe, plain_attention
from clipkd.export.tokenizer import convert_tokenizer, write_tokenizer
from clipkd.models.encoder import Encoder


def require_executorch() -> None:
    """Raises: ValueError if it is not installed."""
    try:
        import executorch.exir  # noqa: F401  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError(f"--to executorch needs {error.name}: pip install 'clipkd[executorch]'") from error


def executorch_file(folder: Path, tower: str) -> Path:
    """tower: vision or text."""
    return folder / "executorch" / f"{tower}_model.pte"


def write_executorch(encoder: Encoder, folder: Path) -> None:
    """executorch/vision_model.pte ([1, 3, h, w] → [1, d]) and text_model.pte ([1, context] → [1, d]), unit-norm, float32.

    Beside them about.json, which says how images and texts are made ready, and tokenizer.json one folder above.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # type: ignore[import-not-found]
        XnnpackPartitioner,
    )
    from executorch.exir import to_edge_transform_and_lower  # type: ignore[import-not-found]

    (folder / "executorch").mkdir()
    tokenizer = convert_tokenizer(encoder)
    write_tokenizer(tokenizer, folder)
    files.write_json(folder / "executorch" / "about.json", describe(encoder, tokenizer, dynamic=False))
    pixels = torch.zeros(1, 3, *encoder.spec.size)
    texts = encoder.spec.tokenize(["a photo of a cat"])
    for name, tower, example in (
        ("vision", VisionTower(encoder), pixels),
        ("text", TextTower(encoder, dynamic=False), texts),
    ):
        with plain_attention():
            program = torch.export.export(tower.eval(), (example,))
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
        executorch_file(folder, name).write_bytes(lowered.buffer)
