"""Write both towers as ExecuTorch programs for phones: one input at a time, on the XNNPACK kernels."""

from pathlib import Path

import torch

from clipkd import files
from clipkd.export.onnx import Tower, describe, plain_attention
from clipkd.export.tokenizer import convert_tokenizer
from clipkd.models.encoder import Encoder


def write_executorch(encoder: Encoder, folder: Path) -> None:
    """Write executorch/vision_model.pte ([1, 3, h, w] → [1, d]) and text_model.pte ([1, context] → [1, d]).

    Features are unit-norm float32. about.json beside them and tokenizer.json one folder above describe the inputs.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # type: ignore[import-not-found]
        XnnpackPartitioner,
    )
    from executorch.exir import to_edge_transform_and_lower  # type: ignore[import-not-found]

    (folder / "executorch").mkdir()
    tokenizer = convert_tokenizer(encoder)
    tokenizer.save(str(folder / "tokenizer.json"))
    files.write_json(folder / "executorch" / "about.json", describe(encoder, tokenizer, dynamic=False))
    towers = {
        "vision": (encoder.encode_image, torch.zeros(1, 3, *encoder.spec.size)),
        "text": (encoder.encode_text, encoder.spec.tokenize(["a photo of a cat"])),
    }
    for name, (encode, example) in towers.items():
        with plain_attention():
            program = torch.export.export(Tower(encoder, encode).eval(), (example,))
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
        (folder / "executorch" / f"{name}_model.pte").write_bytes(lowered.buffer)
