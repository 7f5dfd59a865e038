"""`clipkd cache verify`: is a cache what was written, and would its teachers write it again?"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from clipkd import data
from clipkd.arguments import parse_into
from clipkd.assemble import (
    configured_teachers,
    hold_teachers,
    load_teacher,
    loaded,
    main_process_track,
    make_accelerator,
    open_data,
)
from clipkd.cache.captions import Captions
from clipkd.cache.encode import Job, collate
from clipkd.cache.options import VerifyConfig
from clipkd.feature_store import (
    CONFIG,
    Manifest,
    TeacherCache,
    find_faults,
    read_manifest,
    require_same,
    sources_of,
    to_json,
    weight_files,
)

NORM_TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""How far rounding may take a vector from unit norm."""

COSINE_TOLERANCE = {"no": 1e-4, "bf16": 1e-2, "fp16": 1e-2}
"""How far features computed again, perhaps on another device, may turn away; by the autocast of the towers."""


@dataclass
class Findings:
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def verify(arguments: list[str]) -> Findings:
    """Arguments: the folder, then options, which may override those that made it (data.path, teacher.model, …).

    Raises: FileNotFoundError or ValueError if it is no finished cache, or what is needed to compute again is not there.
    """
    folder = Path(arguments[0] if arguments and not arguments[0].startswith("-") else "")
    known = ["--config", str(folder / CONFIG), "--output", str(folder)] if (folder / CONFIG).is_file() else []
    about = "Check a cache: clipkd cache verify FOLDER [--recompute 64]."
    config = parse_into(VerifyConfig, [*known, *arguments[1 if folder.name else 0 :]], "cache verify", about)
    manifest, findings = read_manifest(folder), Findings()
    cache = TeacherCache(folder, manifest)
    findings.lines.append(f"{folder}: {cache.describe()}")
    faults = find_faults(folder, manifest, track=main_process_track(), trust=False)
    findings.problems += faults.values()
    findings.lines.append(
        f"{len(manifest.files()) - len(faults)} of {len(manifest.files())} files have their size and SHA-256"
    )
    if not faults:
        check_features(folder, manifest, findings)
        if config.recompute:
            compare_again(config, cache, findings)
    return findings


def check_features(folder: Path, manifest: Manifest, findings: Findings) -> None:
    """Norms, and that every caption of a usable sample has a row."""
    tolerance, worst, usable, num_texts = NORM_TOLERANCE[manifest.dtype], 0.0, 0, manifest.num_texts
    cache = TeacherCache(folder, manifest)
    for shard in manifest.shards:
        texts = np.load(folder / shard.files["samples"].name)[:, 1:]
        good = texts[:, 0] >= 0
        usable += int(good.sum())
        if texts.size and (texts.max() >= num_texts or texts.min() < -1):
            findings.problems.append(f"{folder / shard.files['samples'].name} names captions that no shard holds")
        for kind, file in shard.files.items():
            if kind == "samples" or not file.shape[0]:
                continue
            rows = torch.from_numpy(np.load(folder / file.name))
            rows = cache.as_float(rows[torch.from_numpy(good)] if kind.startswith("image") else rows)
            off = (rows.norm(dim=-1) - 1).abs().max().item() if rows.numel() else 0.0
            worst = max(worst, off)
            if not off <= tolerance:  # NaN is no better
                findings.problems.append(f"{folder / file.name} holds a vector whose norm is off by {off:.2g}")
    if usable + manifest.num_unusable != manifest.num_samples:
        findings.problems.append(
            f"{usable} samples are usable, the manifest says {manifest.num_samples - manifest.num_unusable}"
        )
    findings.lines.append(f"{usable:,} of {manifest.num_samples:,} samples usable; norms within {worst:.1g} of 1")


def compare_again(config: VerifyConfig, cache: TeacherCache, findings: Findings) -> None:
    """Some samples, all their views and first captions, by the teachers themselves.

    Raises: ValueError if the data or the teachers are others than those that the cache was made with.
    """
    teachers, pairs = [load_teacher(options) for options in configured_teachers(config)], open_data(config)
    hold_teachers(teachers)
    if not isinstance(pairs, data.PairSet):
        raise ValueError("a cache is made from local data; data.path names shards behind URLs or pipes")
    plan = cache.manifest.plan()
    now = []
    for before, options, teacher in zip(plan["teachers"], configured_teachers(config), teachers, strict=True):
        assert options.model is not None
        files = {str(path): "" for path in weight_files(options.model, options.pretrained)}
        now.append(before | {"identity": json.loads(json.dumps(teacher.identity)), "files": files})
    require_same(cache.folder, plan, plan | {"data": [to_json(one) for one in sources_of(pairs)], "teachers": now})
    accelerator = make_accelerator(config)
    encoders = [encoder.to(accelerator.device) for encoder in loaded(teachers)]
    job = Job(config, pairs, Captions.none(), encoders, None, accelerator)
    ids = np.unique(np.linspace(0, len(pairs) - 1, min(config.recompute, len(pairs))).astype(int)).tolist()
    largest, lowest, compared = 0.0, 1.0, 0
    dataset = job.dataset()
    for start in range(0, len(ids), job.samples_at_a_time):
        batch = collate([dataset[id] for id in ids[start : start + job.samples_at_a_time]])
        images = job.encode_images(batch)
        for row, id in enumerate(ids[start : start + job.samples_at_a_time]):
            if batch.skips[row] is not None:
                continue
            pair = pairs.read(id)
            texts = job.encode_texts([pair.captions[0]])
            for view in range(config.views):
                stored = cache.read(pair, id, view, 0)
                again = [each for n in range(len(teachers)) for each in (images[n][row, view], texts[n][0])]
                for one, other in zip(stored, again, strict=False):
                    a, b = (cache.as_float(torch.from_numpy(np.array(each))) for each in (one, other))
                    largest = max(largest, (a - b).abs().max().item())
                    lowest = min(lowest, torch.cosine_similarity(a, b, dim=0).item())
            compared += 1
    tolerance = COSINE_TOLERANCE[cache.manifest.precision]
    findings.lines.append(
        f"{compared} samples computed again, {config.views} views each: largest difference {largest:.2g}, lowest cosine "
        f"{lowest:.7f}"
    )
    if not lowest >= 1 - tolerance:
        findings.problems.append(
            f"the teachers compute other features: a cosine of {lowest:.5f} with those of {cache.folder}"
        )
