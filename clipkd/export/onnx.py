"""The two towers as ONNX files, for ONNX Runtime and transformers.js: float32, float16 and int8, self-describing."""

import contextlib
import hashlib
import importlib.metadata
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from clipkd import files
from clipkd.export.tokenizer import convert_tokenizer, write_tokenizer
from clipkd.models.cost import count_macs
from clipkd.models.encoder import Encoder
from clipkd.models.onnx_student import onnx_file
from clipkd.models.students import count_parameters

OPSET = 18
LARGEST = 2**31
"""Bytes of one file: what protobuf can hold."""


class VisionTower(nn.Module):
    """Names of inputs are those of transformers.js, here and below."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.encoder.encode_image(pixel_values)


class TextTower(nn.Module):
    """dynamic: takes any number of tokens up to the context; else the whole context."""

    def __init__(self, encoder: Encoder, *, dynamic: bool) -> None:
        super().__init__()
        self.encoder, self.dynamic = encoder, dynamic

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder.encode_short(input_ids) if self.dynamic else self.encoder.encode_text(input_ids)


def require_onnx() -> None:
    """Raises: ValueError if what is needed is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f"ONNX needs {error.name}: pip install 'clipkd[onnx]'") from error


def check_preprocessing(encoder: Encoder) -> None:
    """Raises: ValueError if an image is made ready in a way that the files' metadata cannot tell."""
    mode, (height, width) = encoder.preprocess_config["resize_mode"], encoder.spec.size
    if not (mode == "squash" or (mode == "shortest" and height == width)):
        raise ValueError(
            f"{encoder.name} resizes images by {mode!r} to {height} × {width}; ONNX export knows 'squash', and 'shortest' "
            "to a square; use --to open_clip"
        )
    if encoder.spec.interpolation not in ("bicubic", "bilinear"):
        raise ValueError(
            f"{encoder.name} interpolates images by {encoder.spec.interpolation!r}; ONNX export knows bicubic and bilinear; "
            "use --to open_clip"
        )


def write_onnx(encoder: Encoder, folder: Path) -> None:
    """onnx/vision_model.onnx, onnx/text_model.onnx and tokenizer.json below a folder, in float32.

    Outputs are unit-norm. Batch is dynamic, and so is the number of tokens where the text tower is causal.
    Raises: ValueError if a tower cannot be exported.
    """
    check_preprocessing(encoder)
    tokenizer = convert_tokenizer(encoder)
    write_tokenizer(tokenizer, folder)
    texts = encoder.spec.tokenize(["a photo of a cat", "two dogs and a bird in the snow"])
    pixels = torch.randn(2, 3, *encoder.spec.size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        dynamic = encoder.short_text_tower is not None and encoder.looks_back_only(texts)
    about = describe(encoder, tokenizer, dynamic=dynamic)
    batch = torch.export.Dim("batch")
    sequence = {1: torch.export.Dim("sequence", min=2, max=texts.shape[1])} if dynamic else {}
    (folder / "onnx").mkdir(exist_ok=True)
    for name, tower, example, argument, output, shape in (
        ("vision", VisionTower(encoder), pixels, "pixel_values", "image_embeds", {0: batch}),
        ("text", TextTower(encoder, dynamic=dynamic), texts, "input_ids", "text_embeds", {0: batch, **sequence}),
    ):
        if 4 * count_parameters(encoder.model)["image" if name == "vision" else "text"] > LARGEST:
            raise ValueError(f"{encoder.name}: its {name} tower has more than 2 GB, the limit of one ONNX file")
        try:
            with plain_attention():
                program = torch.onnx.export(
                    tower.eval(),
                    (example,),
                    dynamo=True,
                    input_names=[argument],
                    output_names=[output],
                    dynamic_shapes={argument: shape},
                    opset_version=OPSET,
                    external_data=False,
                    verbose=False,
                )
        except (RuntimeError, ValueError, torch.onnx.OnnxExporterError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{encoder.name}: torch cannot export its {name} tower to ONNX: {reason}") from error
        assert program is not None
        save(
            program.model_proto,
            onnx_file(folder, name, "onnx"),
            {key: json.dumps(value) for key, value in about.items()},
        )


def describe(encoder: Encoder, tokenizer: Tokenizer, *, dynamic: bool) -> dict[str, Any]:
    """What one needs to use the towers; every value is JSON. dynamic: texts may be shorter than the context."""
    pixels = torch.zeros(1, 3, *encoder.spec.size)
    tokens = encoder.spec.tokenize(["a photo of a cat"])
    with torch.inference_mode():
        macs = {
            "image": count_macs(encoder, lambda: encoder.encode_image(pixels)),
            "text": count_macs(encoder, lambda: encoder.encode_text(tokens)),
        }
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
        "context_length": tokens.shape[1],
        "dynamic_sequence": dynamic,
        "pad_id": (tokenizer.padding or {}).get("pad_id", 0),
        "tokenizer": "tokenizer.json",
        "tokenizer_sha256": hashlib.sha256(tokenizer.to_str(pretty=True).encode()).hexdigest(),
        "parameters": count_parameters(encoder.model),
        "macs": macs,
    }


def write_int8(folder: Path) -> None:
    """Weights of the float32 files in 8 bits, activations quantized as they come: MatMul, in text also the embedding.

    Unsigned weights: products of unsigned with signed bytes overflow 16 bits on x86 CPUs without VNNI, so that a file would
    give other answers there. Convolutions stay float32: ONNX Runtime's dynamic ones are slower than that on most CPUs.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    for tower, operators in (("vision", ["MatMul"]), ("text", ["MatMul", "Gather"])):
        source, path = onnx_file(folder, tower, "onnx"), onnx_file(folder, tower, "onnx-int8")
        quantize_dynamic(source, path, op_types_to_quantize=operators, per_channel=True, weight_type=QuantType.QUInt8)
        save(onnx.load(path), path, metadata(onnx.load(source)))  # without what the quantizer adds, which is not JSON


def write_fp16(folder: Path) -> None:
    """The float32 files with weights and arithmetic in float16, inputs and outputs in float32.

    LayerNormalization stays float32: with it in float16, ONNX Runtime 1.31 and 1.32 crash at their default optimisation.
    """
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    for tower in ("vision", "text"):
        model = onnx.load(onnx_file(folder, tower, "onnx"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values too small for float16: they become 0, which parity then shows
            half = convert_float_to_float16(
                model, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, "LayerNormalization"]
            )
        save(half, onnx_file(folder, tower, "onnx-fp16"), metadata(model))


def write_immich(encoder: Encoder, folder: Path) -> None:
    """visual/ and textual/ below immich/, with the names and types that immich's CLIP models have (immich-app/immich)."""
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
        if name == "textual":  # immich gives tokens as int32
            entry.type.tensor_type.elem_type = onnx.TensorProto.INT32
            cast = onnx.helper.make_node("Cast", [argument], [f"{argument}_int64"], to=onnx.TensorProto.INT64)
            model.graph.node.insert(0, cast)
        save(model, target / name / "model.onnx", metadata(model))
    tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (target / "textual" / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    pad_id = (json.loads(tokenizer)["padding"] or {}).get("pad_id", 0)
    vocabulary = {number: token for token, number in json.loads(tokenizer)["model"]["vocab"].items()}
    files.write_json(target / "textual" / "tokenizer_config.json", {"pad_token": vocabulary[pad_id]})
    files.write_json(target / "visual" / "preprocess_cfg.json", encoder.preprocess_config)
    files.write_json(target / "config.json", encoder.model_config or {})


def metadata(model: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def save(model: Any, path: Path, about: Mapping[str, str]) -> None:
    """Without what the exporter notes of itself: lines of code and their paths. Raises: OSError that names the file."""
    import onnx

    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info, graph):
        part.doc_string = ""
        del part.metadata_props[:]
    onnx.helper.set_model_props(model, dict(about))
    content = model.SerializeToString()
    try:
        path.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """The fused kernel of inference has no ONNX operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter's own, about its internals
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
