"""An image processor that gives open_clip's pixels: PIL's resizing, a centre crop rounded half to even.

Images become RGB first. AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True) uses it.
"""

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor


class ExactImageProcessor(BaseImageProcessor):
    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(self, **options):
        super().__init__(**options)
        self.options = options

    def preprocess(self, images, return_tensors=None):  # type: ignore[override]
        images = images if isinstance(images, list | tuple) else [images]
        return BatchFeature({"pixel_values": [self.pixels(image) for image in images]}, tensor_type=return_tensors)

    def pixels(self, image):
        image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
        image, size, crop = image.convert("RGB"), self.options["size"], self.options.get("crop_size")
        if crop:
            scale, width, height = size["shortest_edge"], crop["width"], crop["height"]
            image = image.resize([int(scale * side / min(image.size)) for side in image.size], self.options["resample"])
            left, upper = round((image.width - width) / 2), round((image.height - height) / 2)
            image = image.crop((left, upper, left + width, upper + height))
        else:
            image = image.resize((size["width"], size["height"]), self.options["resample"])
        mean, std = (np.asarray(self.options[name], np.float32) for name in ("image_mean", "image_std"))
        return ((np.asarray(image) / np.float32(255) - mean) / std).transpose(2, 0, 1)
