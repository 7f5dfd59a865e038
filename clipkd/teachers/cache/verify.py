"""`clipkd cache verify`: check that a cache holds what was written, and that its teachers compute the same features."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from clipkd import data, distributed
from clipkd.config.parse import parse_into
from clipkd.models.load import weight_files
from clipkd.teachers.cache.encode import FeatureEncoder, collate
from clipkd.teachers.cache.plan import VerifyConfig
from clipkd.teachers.loaded import load_teachers
from clipkd.teachers.store.compare import require_same
from clipkd.teachers.store.manifest import CONFIG, as_json, augmentation_of, read_manifest, sources_of
from clipkd.teachers.store.reader import TeacherCache, find_faults

COSINE_TOLERANCE, COSINE_TOLERANCE_HALF = 1e-4, 1e-2
"""1 − cosine of stored and recomputed features, perhaps on another device, in single precision and with a half-precision part."""

ABOUT = "Check a cache: clipkd cache verify FOLDER [--recompute 64]."


def verify(arguments: list[str]) -> list[str]:
    """Check the cache in a folder, print what was checked, and return the problems.

    arguments: the folder, then options, which override the cache's configuration where data or teachers have moved.

    Raises: FileNotFoundError or ValueError if the folder is no finished cache.
    """
    if arguments[:1] in (["--help"], ["-h"]):
        parse_into(VerifyConfig, ["--help"], "cache verify", ABOUT)
    if not arguments or arguments[0].startswith("-"):
        raise ValueError("name the folder first: clipkd cache verify FOLDER [--recompute 64]")
    folder, options = Path(arguments[0]), arguments[1:]
    made_with = ["--config", str(folder / CONFIG), "--output", str(folder)]
    config = parse_into(VerifyConfig, [*made_with, *options], "cache verify", ABOUT) if options else None
    cache = TeacherCache(folder, read_manifest(folder))
    print(f"{folder}: {cache.describe()}")
    faults, num_files = find_faults(folder, cache.manifest, trust=False), len(cache.manifest.files())
    print(f"{num_files - len(faults)} of {num_files} files have their size and SHA-256")
    if faults:
        print("run the same clipkd cache command again to rebuild the damaged files")
        return list(faults.values())
    print(f"{cache.manifest.num_samples - cache.manifest.num_unusable:,} samples usable")
    try:
        return recompute(config, cache) if config is not None and config.recompute else []
    except (ValueError, OSError) as error:
        return [f"nothing was recomputed: {error}; --data.path and --teacher.models name what has moved"]


def recompute(config: VerifyConfig, cache: TeacherCache) -> list[str]:
    """Compute the features of some samples, all views and first captions, and compare; return the problems.

    Raises: ValueError naming the option or file in which data, teachers or options differ from the cache.
    """
    teachers, pairs = load_teachers(config, None), data.open_pairs(config.data)
    if not isinstance(pairs, data.PairSet):
        raise ValueError("a cache is made from local data; data.path names shards behind URLs or pipes")
    now = {
        "num_views": config.views,
        "dtype": config.dtype,
        "augmentation": augmentation_of(config),
        "data": sources_of(pairs),
        "teachers": [
            {"identity": identity, "model": model, "files": {str(path): "" for path in weight_files(model)}}
            for identity, model in zip(teachers.identities, config.teacher.names, strict=True)
        ],
    }
    plan = cache.manifest.plan()
    teachers_before = [{"identity": record["identity"]} for record in plan["teachers"]]
    require_same(cache.folder, {name: plan[name] for name in now} | {"teachers": teachers_before}, as_json(now))
    accelerator = distributed.make_accelerator(config.precision)
    teachers.to(accelerator.device)
    # In float32 whatever the cache stores, so that the difference shows what rounding costs.
    exact = dataclasses.replace(config, dtype="float32")
    encoder = FeatureEncoder(exact, pairs, teachers.encoders, None, accelerator)
    dataset, num_recomputed, largest, lowest, problems = encoder.dataset(), 0, 0.0, 1.0, []
    for id in np.unique(np.linspace(0, len(pairs) - 1, min(config.recompute, len(pairs))).astype(int)).tolist():
        batch = collate([dataset[id]])
        if batch.skips[0] is not None:
            continue
        pair = pairs.read(id)
        computed = encoder.encode_images(batch) | encoder.encode_texts([pair.captions[0]])
        try:
            rows = [cache.read(pair, id, view, 0) for view in range(config.views)]
        except data.BadSample as bad:
            problems.append(f"{bad}, but it can be used now: make another cache")
            continue
        num_recomputed += 1
        for kind, *found in zip(cache.kinds, *rows, strict=True):
            stored = cache.as_float(torch.from_numpy(np.stack(found)))
            again = torch.from_numpy(computed[kind][0]).expand_as(stored)  # a caption's in every view
            largest = max(largest, (stored - again).abs().max().item())
            lowest = min(lowest, torch.cosine_similarity(stored, again).min().item())
    print(
        f"{num_recomputed} samples recomputed, {config.views} views each: largest difference {largest:.2g}, lowest cosine "
        f"{lowest:.7f}"
    )
    half = cache.manifest.precision != "no" or config.teacher.dtype != "fp32"
    if not lowest >= 1 - (COSINE_TOLERANCE_HALF if half else COSINE_TOLERANCE):
        problems.append(f"the teachers compute other features than {cache.folder} holds: their cosine is {lowest:.5f}")
    return problems
