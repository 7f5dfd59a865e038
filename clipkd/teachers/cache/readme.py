"""README.md of a cache: its format, for those who read it without clipkd."""

from clipkd.teachers.store.manifest import Manifest

TEMPLATE = """# Features of {names}

Made by `clipkd cache`: image features of {num_views} augmented views of each of {num_samples:,} samples, and text features of
{num_texts:,} distinct captions. `manifest.json` says from what (teachers with the SHA-256 of their weights, preprocessing and
tokens; data; seed and version of the augmentation), and lists every file with its size and SHA-256. `config.yaml` is the
configuration that made it; `clipkd cache verify FOLDER` checks it. Train from it with `--teacher.cache FOLDER`.

All files are .npy: a header, then rows of one length. Shard NNNNN holds samples `first` to `first + rows - 1` of the data:

| file | shape | what |
|---|---|---|
| `features/NNNNN.samples.npy` | rows, 1 + captions, int64 | see below |
| `features/NNNNN.image.T.npy` | rows, views, width, {dtype} | teacher T's features of each view |
| `features/NNNNN.text.T.npy` | texts, width, {dtype} | teacher T's features of the captions first met in this shard |

A row of `samples` holds the CRC-32 of the sample's image and captions, then for each of its captions its row among all texts
(-1: no more; one with nothing but -1 could not be used). A shard's texts are rows `first_text` to `first_text + texts - 1`.
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
    return TEMPLATE.format(
        names=", ".join(teacher.name for teacher in plan.teachers),
        num_views=plan.num_views,
        num_samples=plan.num_samples,
        num_texts=plan.num_texts,
        dtype={"bfloat16": "uint16 (bfloat16)"}.get(plan.dtype, plan.dtype),
        rounding="" if plan.dtype == "float32" else ", but for rounding",
        bfloat16=BFLOAT16 if plan.dtype == "bfloat16" else "",
    )
