"""README.md of a cache: its format, for readers without clipkd."""

from clipkd.teachers.store.manifest import Manifest

TEMPLATE = """# Features of {names}

Made by `clipkd cache`: image features of {num_views} augmented views of each of {num_samples:,} samples, and text features of
{num_texts:,} distinct captions. Train from it with `--teacher.cache FOLDER`; check it with `clipkd cache verify FOLDER`.

* `manifest.json`: teachers (SHA-256 of weights, preprocessing, tokens), data, augmentation, and every file with size and SHA-256.
* `config.yaml`: the configuration that made the cache. `plan.json` and `records/`: what the same command needs to rebuild files.

All files are .npy: a header, then rows of one length. Shard NNNNN holds samples `first` to `first + rows - 1` of the data:

| file | shape | content |
|---|---|---|
| `features/NNNNN.samples.npy` | rows, 1 + captions, int64 | see below |
| `features/NNNNN.image.T.npy` | rows, views, width, {dtype} | teacher T's features of each view |
| `features/NNNNN.text.T.npy` | texts, width, {dtype} | teacher T's features of the captions that occur first in this shard |

A row of `samples` holds the CRC-32 of the sample's image and captions, then the row of each of its captions among all texts
(-1 pads; a sample with -1 only could not be used). A shard's texts are rows `first_text` to `first_text + texts - 1`.
Features have norm 1{rounding}. In Python:

```python
import json
import numpy as np
shards = json.load(open("manifest.json"))["shards"]
load = lambda kind: [np.load(shard["files"][kind]["name"], mmap_mode="r") for shard in shards]
image = load("image.0")[0][2, 0]  # shard 0, its third sample, its first view
text = np.concatenate(load("text.0"))[load("samples")[0][2, 1]]  # that sample's first caption
```
{bfloat16}"""

BFLOAT16 = """
numpy has no bfloat16: the bits are stored as uint16, and `(image.astype(np.uint32) << 16).view(np.float32)` widens them.
"""


def describe_folder(plan: Manifest) -> str:
    half = plan.dtype == "bfloat16"
    return TEMPLATE.format(
        names=", ".join(teacher.name for teacher in plan.teachers),
        num_views=plan.num_views,
        num_samples=plan.num_samples,
        num_texts=plan.num_texts,
        dtype="uint16 (bfloat16)" if half else plan.dtype,
        rounding="" if plan.dtype == "float32" else ", up to rounding",
        bfloat16=BFLOAT16 if half else "",
    )
