"""Write both towers as ONNX files for ONNX Runtime, transformers.js and immich, or as ExecuTorch programs, with metadata."""

import contextlib
import hashlib
import importlib.metadata
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from clipkd import files
from clipkd.export.tokenizer import convert_tokenizer
from clipkd.models.cost import count_cost
from clipkd.models.encoder import Encoder
from clipkd.models.onnx_student import onnx_file

OPSET = 18


class Tower(nn.Module):
    """One encoder method as a module."""

    def __init__(self, encoder: Encoder, encode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder, self.encode = encoder, encode

    def forward(self, inputs: Tensor) -> Tensor:
        return self.encode(inputs)


def check_preprocessing(encoder: Encoder) -> None:
    """Raises: ValueError if the files' metadata cannot describe the student's image preprocessing."""
    mode, how, (height, width) = encoder.preprocess_config["resize_mode"], encoder.spec.interpolation, encoder.spec.size
    is_known = mode == "squash" or (mode == "shortest" and height == width)
    if not is_known or how not in ("bicubic", "bilinear"):
        raise ValueError(
            f"{encoder.name} resizes images by {mode!r} ({how}) to {height} × {width}; ONNX export knows 'squash', "
            "'shortest' to a square, bicubic and bilinear; use --to open_clip"
        )


def write_onnx(encoder: Encoder, folder: Path) -> None:
    """Write onnx/vision_model.onnx, onnx/text_model.onnx (float32) and tokenizer.json.

    Outputs are unit-norm. The batch size is dynamic; so is the number of tokens if the text tower is causal.
    Raises: ValueError or an error of torch's exporter if a tower cannot be exported.
    """
    check_preprocessing(encoder)
    tokenizer = convert_tokenizer(encoder)
    tokenizer.save(str(folder / "tokenizer.json"))
    texts = encoder.spec.tokenize(["a photo of a cat", "two dogs and a bird in the snow"])
    pixels = torch.randn(2, 3, *encoder.spec.size, generator=torch.Generator().manual_seed(0))
    dynamic = encoder.short_text_tower is not None
    about = {key: json.dumps(value) for key, value in describe(encoder, tokenizer, dynamic=dynamic).items()}
    batch = torch.export.Dim("batch")
    sequence = {1: torch.export.Dim("sequence", min=2, max=texts.shape[1])} if dynamic else {}
    encode_text = encoder.encode_short if dynamic else encoder.encode_text
    (folder / "onnx").mkdir(exist_ok=True)
    for name, encode, example, argument, output, shape in (
        ("vision", encoder.encode_image, pixels, "pixel_values", "image_embeds", {0: batch}),
        ("text", encode_text, texts, "input_ids", "text_embeds", {0: batch, **sequence}),
    ):
        with plain_attention():
            program = torch.onnx.export(
                Tower(encoder, encode).eval(),
                (example,),
                dynamo=True,
                input_names=[argument],  # names as in transformers.js
                output_names=[output],
                dynamic_shapes=(shape,),
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
        assert program is not None
        save(program.model_proto, onnx_file(folder, name, "onnx"), about)


def describe(encoder: Encoder, tokenizer: Tokenizer, *, dynamic: bool) -> dict[str, Any]:
    """Metadata needed to run the towers, as JSON values. dynamic: texts may be shorter than the context."""
    return {
        "clipkd_version": importlib.metadata.version("clipkd"),
        "source_sha256": encoder.weights_sha256(),
        "normalized": True,
        "embed_dim": encoder.dim,
        "logit_scale": encoder.logit_scale.item(),
        "logit_bias": None if encoder.logit_bias is None else encoder.logit_bias.item(),
        "image_size": list(encoder.spec.size),
        "image_mean": list(encoder.spec.mean),
        "image_std": list(encoder.spec.std),
        "interpolation": encoder.spec.interpolation,
        "resize_mode": encoder.preprocess_config["resize_mode"],
        "context_length": encoder.spec.tokenize(["a"]).shape[1],
        "dynamic_sequence": dynamic,
        "pad_id": (tokenizer.padding or {}).get("pad_id", 0),
        "tokenizer": "tokenizer.json",
        "tokenizer_sha256": hashlib.sha256(tokenizer.to_str(pretty=True).encode()).hexdigest(),
        **count_cost(encoder),
    }


def write_int8(_: Encoder, folder: Path) -> None:
    """Write the float32 files with 8-bit weights (MatMul, in text also the embedding) and dynamic activation scales.

    Weights are unsigned: products of unsigned and signed bytes overflow 16 bits on x86 CPUs without VNNI, which changes the
    features there. Convolutions stay float32: ONNX Runtime's dynamic int8 ones are slower on most CPUs.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for tower, operators in (("vision", ["MatMul"]), ("text", ["MatMul", "Gather"])):
        source, path = onnx_file(folder, tower, "onnx"), onnx_file(folder, tower, "onnx-int8")
        quantize_dynamic(source, path, op_types_to_quantize=operators, per_channel=True, weight_type=QuantType.QUInt8)
        save(onnx.load(path), path, metadata(onnx.load(source)))  # without the quantizer's metadata, which is not JSON


def write_fp16(_: Encoder, folder: Path) -> None:
    """Write the float32 files with float16 weights and arithmetic, and float32 inputs and outputs.

    LayerNormalization stays float32: with it in float16, ONNX Runtime 1.31 and 1.32 crash at their default optimisation.
    """
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    for tower in ("vision", "text"):
        model = onnx.load(onnx_file(folder, tower, "onnx"))
        blocked = [*DEFAULT_OP_BLOCK_LIST, "LayerNormalization"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # values that underflow float16 become 0; parity measures the effect
            half = convert_float_to_float16(model, keep_io_types=True, op_block_list=blocked)
        save(half, onnx_file(folder, tower, "onnx-fp16"), metadata(model))


def write_immich(encoder: Encoder, folder: Path) -> None:
    """Write immich/visual/ and immich/textual/ with the names and types of immich's CLIP models (immich-app/immich)."""
    import onnx

    target = folder / "immich"
    for name, tower, argument in (("visual", "vision", "image"), ("textual", "text", "text")):
        (target / name).mkdir(parents=True)
        model = onnx.load(onnx_file(folder, tower, "onnx"))
        (entry,) = model.graph.input
        for node in model.graph.node:
            for place, used in enumerate(node.input):
                if used == entry.name:
                    node.input[place] = f"{argument}_int64" if name == "textual" else argument
        entry.name = argument
        if name == "textual":  # immich passes tokens as int32
            entry.type.tensor_type.elem_type = onnx.TensorProto.INT32
            cast = onnx.helper.make_node("Cast", [argument], [f"{argument}_int64"], to=onnx.TensorProto.INT64)
            model.graph.node.insert(0, cast)
        save(model, target / name / "model.onnx", metadata(model))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.save(str(target / "textual" / "tokenizer.json"))
    pad_token = tokenizer.id_to_token((tokenizer.padding or {}).get("pad_id", 0))
    files.write_json(target / "textual" / "tokenizer_config.json", {"pad_token": pad_token})
    files.write_json(target / "visual" / "preprocess_cfg.json", encoder.preprocess_config)
    files.write_json(target / "config.json", encoder.model_config or {})


def write_executorch(encoder: Encoder, folder: Path) -> None:
    """Write both towers as ExecuTorch programs for phones: one input at a time, on the XNNPACK kernels.

    executorch/vision_model.pte maps [1, 3, h, w] to [1, d], text_model.pte [1, context] to [1, d]. Features are unit-norm
    float32. about.json beside them and tokenizer.json one folder above describe the inputs.
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


def metadata(model: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def save(model: Any, path: Path, about: Mapping[str, str]) -> None:
    """Write a model with this metadata, without the exporter's notes, which hold source lines and paths."""
    import onnx

    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info, graph):
        part.doc_string = ""
        del part.metadata_props[:]
    onnx.helper.set_model_props(model, dict(about))
    content = model.SerializeToString()
    files.write_whole(path, lambda file: file.write(content))


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Disable the fused attention kernel of inference, which has no ONNX operator, gradients and exporter warnings."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
