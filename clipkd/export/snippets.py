"""Example code for the model card, one listing per runtime; each export runs it and shows its output."""

import json

from clipkd.export.probes import EXAMPLE_LABELS
from clipkd.models.onnx_student import SUFFIXES

LABELS = f"labels = {json.dumps(EXAMPLE_LABELS)}"
SHOW = """\
for label, probability in zip(labels, probabilities):
    print(f"{label}: {probability:.3f}")
"""

OPEN_CLIP = f"""\
import open_clip, torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:.")
tokenizer = open_clip.get_tokenizer("local-dir:.")
{LABELS}
image = Image.open("example.png").convert("RGB")
with torch.inference_mode():
    image = model.eval().encode_image(preprocess(image)[None], normalize=True)
    text = model.encode_text(tokenizer(labels), normalize=True)
    logits = model.logit_scale.exp() * image @ text.T
probabilities = %PROBABILITIES%[0].tolist()
{SHOW}"""

TRANSFORMERS = f"""\
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(".")
processor = AutoProcessor.from_pretrained("./exact", trust_remote_code=True)
{LABELS}
length = dict(padding="max_length", truncation=True)
image = Image.open("example.png").convert("RGB")
inputs = processor(images=image, text=labels, return_tensors="pt", **length)
with torch.inference_mode():
    logits = model(**inputs).logits_per_image
probabilities = %PROBABILITIES%[0].tolist()
{SHOW}"""

PIXELS = """\
image = Image.open("example.png").convert("RGB")
height, width = about["image_size"]
how = Image.Resampling[about["interpolation"].upper()]
if about["resize_mode"] == "squash":
    image = image.resize((width, height), how)
else:  # the shorter side, then the middle
    image = image.resize([int(height * side / min(image.size)) for side in image.size], how)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    image = image.crop((left, top, left + width, top + height))
pixels = (np.asarray(image, np.float32) / 255 - about["image_mean"]) / about["image_std"]
pixels = pixels.transpose(2, 0, 1)[None].astype(np.float32)
"""
LOGITS = f"""\
logits = about["logit_scale"] * image_embeds @ text_embeds.T
probabilities = %PROBABILITIES%[0]
{SHOW}"""

ONNX = f"""\
import json
import numpy as np, onnxruntime
from PIL import Image
from tokenizers import Tokenizer

vision = onnxruntime.InferenceSession("onnx/vision_model%SUFFIX%.onnx")
text = onnxruntime.InferenceSession("onnx/text_model%SUFFIX%.onnx")
about = {{key: json.loads(value) for key, value in vision.get_modelmeta().custom_metadata_map.items()}}
{LABELS}

{PIXELS}
tokens = Tokenizer.from_file("tokenizer.json").encode_batch(labels)
ids = np.array([each.ids for each in tokens], np.int64)
(image_embeds,), (text_embeds,) = vision.run(None, {{"pixel_values": pixels}}), text.run(None, {{"input_ids": ids}})
{LOGITS}"""

EXECUTORCH = f"""\
import json
import numpy as np, torch
from executorch.runtime import Runtime
from PIL import Image
from tokenizers import Tokenizer

vision = Runtime.get().load_program("executorch/vision_model.pte").load_method("forward")
text = Runtime.get().load_program("executorch/text_model.pte").load_method("forward")
about = json.load(open("executorch/about.json"))
{LABELS}

{PIXELS}
tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_padding(length=about["context_length"], pad_id=about["pad_id"])
ids = [torch.tensor([tokenizer.encode(label).ids]) for label in labels]
image_embeds = vision.execute([torch.from_numpy(pixels)])[0].numpy()
text_embeds = np.concatenate([text.execute([each])[0].numpy() for each in ids])
{LOGITS}"""


TORCH_SOFTMAX = "logits.softmax(dim=-1)"
NUMPY = (
    "(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())",
    '(1 / (1 + np.exp(-logits - about["logit_bias"])))',
)
SNIPPETS = {
    "open_clip": (OPEN_CLIP, TORCH_SOFTMAX, "(logits + model.logit_bias).sigmoid()"),
    # SiglipModel adds its bias itself; CLIPModel has none, so config.json keeps it.
    "hf": (TRANSFORMERS, TORCH_SOFTMAX, "(logits + getattr(model.config, 'logit_bias', 0)).sigmoid()"),
    **{format: (ONNX.replace("%SUFFIX%", suffix), *NUMPY) for format, suffix in SUFFIXES.items()},
    "executorch": (EXECUTORCH, *NUMPY),
}
"""Format → code, probabilities of a softmax model, probabilities of a model with a logit bias."""


def snippet(format: str, *, sigmoid: bool = False) -> str | None:
    """Code that runs in the exported folder; None for formats without an example."""
    if format not in SNIPPETS:
        return None
    code, softmax, with_bias = SNIPPETS[format]
    return code.replace("%PROBABILITIES%", with_bias if sigmoid else softmax)
