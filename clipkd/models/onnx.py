"""Load the ONNX files of an exported student as an Encoder."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from clipkd.models.encoder import Encoder
from clipkd.models.onnx_student import OnnxStudent


class OnnxTowers(nn.Module):
    """The ONNX files as a module, whose state is the hash of their content."""

    def __init__(self, student: OnnxStudent) -> None:
        super().__init__()
        self.student = student
        digests = b"".join(hashlib.sha256(path.read_bytes()).digest() for path in student.files())
        self.register_buffer("content_sha256", torch.frombuffer(bytearray(digests), dtype=torch.uint8))
        self.register_buffer("logit_scale", torch.tensor(student.logit_scale).log())
        bias = student.logit_bias
        self.register_buffer("logit_bias", None if bias is None else torch.tensor(bias))

    def encode_image(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.student.encode_pixels(images.float().cpu().numpy())).to(images.device)

    def encode_text(self, texts: Tensor) -> Tensor:
        return torch.from_numpy(self.student.encode_ids(texts.cpu().numpy())).to(texts.device)

    @property
    def stated_cost(self) -> dict[str, Any]:
        """Parameters and MACs per tower, counted before the export."""
        return {name: self.student.about[name] for name in ("parameters", "macs")}

    def extra_repr(self) -> str:
        return f"{self.student.format}: {self.student.about}"


class OnnxTokenize:
    """The tokenizer file called like open_clip's; a class, so that it can be pickled for loader processes."""

    def __init__(self, student: OnnxStudent) -> None:
        self.tokenizer = student.tokenizer
        self.context_length, self.pad_id = student.about["context_length"], student.about["pad_id"]

    def __call__(self, texts: list[str]) -> Int[Tensor, "b t"]:
        ids = torch.full((len(texts), self.context_length), self.pad_id)
        for row, encoding in zip(ids, self.tokenizer.encode_batch(texts), strict=True):
            row[: len(encoding.ids)] = torch.tensor(encoding.ids)
        return ids


def load_onnx(folder: Path, format: str) -> Encoder:
    """Raises: ValueError if the folder has no such files."""
    student = OnnxStudent.load(folder, format)
    about = student.about
    preprocess: dict[str, Any] = {
        "size": tuple(about["image_size"]),
        "mode": "RGB",
        "mean": tuple(about["image_mean"]),
        "std": tuple(about["image_std"]),
        "interpolation": about["interpolation"],
        "resize_mode": about["resize_mode"],
    }
    return Encoder(
        OnnxTowers(student),
        name=f"{format}:{folder}",
        short_text_tower=(lambda towers, texts: towers.encode_text(texts)) if about["dynamic_sequence"] else None,
        preprocess_config=preprocess,
        tokenize=OnnxTokenize(student),
        tokenizer_name=f"tokenizer {about['tokenizer_sha256']}",
        dim=about["embed_dim"],
    )
