"""`clipkd cache verify`: is a cache what was written, and would its teachers write it again?"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clipkd import data, distributed, progress
from clipkd.config.parse import parse_into
from clipkd.models.load import weight_files
from clipkd.teachers.cache.captions import Captions
from clipkd.teachers.cache.encode import Job, collate
from clipkd.teachers.cache.options import VerifyConfig
from clipkd.teachers.loaded import Teacher, configured_teachers, hold_teachers, load_teacher, loaded
from clipkd.teachers.store.manifest import (
    CONFIG,
    Manifest,
    augmentation_of,
    read_manifest,
    require_same,
    sources_of,
    to_json,
)
from clipkd.teachers.store.reader import TeacherCache, find_faults

NORM_TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""How far rounding may take a vector from unit norm."""

COSINE_TOLERANCE, COSINE_TOLERANCE_HALF = 1e-4, 1e-2
"""How far features computed again, perhaps on another device, may turn away: in single precision, and in half."""


@dataclass
class Findings:
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def verify(arguments: list[str]) -> Findings:
    """Arguments: the folder, then options, which may override those that made it (data.path, teacher.models, …).

    Raises: FileNotFoundError or ValueError if it is no finished cache, or what is needed to compute again is not there.
    """
    about = "Check a cache: clipkd cache verify FOLDER [--recompute 64]."
    if arguments[:1] in (["--help"], ["-h"]):
        parse_into(VerifyConfig, ["--help"], "cache verify", about)
    if not arguments or arguments[0].startswith("-"):
        raise ValueError("name the folder first: clipkd cache verify FOLDER [--recompute 64]")
    folder, options = Path(arguments[0]), arguments[1:]
    made_with = ["--config", str(folder / CONFIG), "--output", str(folder)]
    config = parse_into(VerifyConfig, [*made_with, *options], "cache verify", about) if options else None
    manifest, findings = read_manifest(folder), Findings()
    cache = TeacherCache(folder, manifest)
    findings.lines.append(f"{folder}: {cache.describe()}")
    faults = find_faults(folder, manifest, track=progress.track_on_main, trust=False)
    findings.problems += faults.values()
    findings.lines.append(
        f"{len(manifest.files()) - len(faults)} of {len(manifest.files())} files have their size and SHA-256"
    )
    if not faults:
        check_features(folder, manifest, findings)
        if config is not None and config.recompute:
            try:
                compare_again(config, cache, findings)
            except (ValueError, OSError) as error:
                advice = "--data.path and --teacher.models name what lies elsewhere now"
                findings.problems.append(f"nothing was computed again: {error}; {advice}")
    else:
        findings.lines.append(f"the clipkd cache command that made {folder} makes the damaged files anew")
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

    Raises: ValueError if data, teachers or options are others than those that the cache was made with.
    """
    teachers = [load_teacher(model, dtype=config.teacher.dtype) for model in configured_teachers(config)]
    pairs = data.open_pairs(config.data)
    hold_teachers(teachers)
    if not isinstance(pairs, data.PairSet):
        raise ValueError("a cache is made from local data; data.path names shards behind URLs or pipes")
    accelerator = distributed.make_accelerator(config.precision)
    require_same_cache(config, cache, teachers, pairs)
    encoders = [encoder.to(accelerator.device) for encoder in loaded(teachers)]
    # Not rounded as the stored ones are: the difference is what rounding has cost.
    job = Job(dataclasses.replace(config, dtype="float32"), pairs, Captions.none(), encoders, None, accelerator)
    ids = np.unique(np.linspace(0, len(pairs) - 1, min(config.recompute, len(pairs))).astype(int)).tolist()
    compared, largest, lowest = 0, 0.0, 1.0
    for start in range(0, len(ids), job.samples_at_a_time):
        own = ids[start : start + job.samples_at_a_time]
        batch = collate([job.dataset()[id] for id in own])
        images = job.encode_images(batch)
        for row, (id, skip) in enumerate(zip(own, batch.skips, strict=True)):
            try:
                pairs_of_vectors = (
                    stored_and_again(job, cache, id, [part[row] for part in images]) if skip is None else []
                )
                if skip is not None and cache.is_usable(id):
                    findings.problems.append(f"{skip.key} has features, but cannot be read now: {skip.message}")
            except data.BadSample as bad:
                findings.problems.append(f"{bad}, but it can be used now: make another cache")
                continue
            for stored, again in pairs_of_vectors:
                largest = max(largest, (stored - again).abs().max().item())
                lowest = min(lowest, torch.cosine_similarity(stored, again, dim=0).item())
            compared += bool(pairs_of_vectors)
    findings.lines.append(
        f"{compared} samples computed again, {config.views} views each: largest difference {largest:.2g}, lowest cosine "
        f"{lowest:.7f}"
    )
    rough = cache.manifest.precision != "no" or any(teacher.identity["dtype"] != "fp32" for teacher in teachers)
    if not lowest >= 1 - (COSINE_TOLERANCE_HALF if rough else COSINE_TOLERANCE):
        findings.problems.append(
            f"the teachers compute other features: a cosine of {lowest:.5f} with those of {cache.folder}"
        )


def require_same_cache(config: VerifyConfig, cache: TeacherCache, teachers: list[Teacher], pairs: data.PairSet) -> None:
    """Raises: ValueError."""
    plan = cache.manifest.plan()
    now = []
    for before, model, teacher in zip(plan["teachers"], configured_teachers(config), teachers, strict=False):
        files = {str(path): "" for path in weight_files(model)}
        now.append(before | {"identity": json.loads(json.dumps(teacher.identity)), "files": files, "model": model})
    found = {"num_views": config.views, "dtype": config.dtype, "augmentation": to_json(augmentation_of(config))}
    found |= {"data": [to_json(one) for one in sources_of(pairs)], "teachers": now}
    require_same(cache.folder, {name: plan[name] for name in found}, found)


def stored_and_again(job: Job, cache: TeacherCache, id: int, images: list[np.ndarray]) -> list[tuple[Tensor, Tensor]]:
    """Vectors of a sample as they are stored, each with its own computed now. Raises: BadSample, RunStopped."""
    pair = job.pairs.read(id)
    texts = [torch.from_numpy(part[0]) for part in job.encode_texts([pair.captions[0]])]
    found = []
    for view in range(job.config.views):
        stored = [cache.as_float(torch.from_numpy(row.copy())) for row in cache.read(pair, id, view, 0)]
        again = [each for n, part in enumerate(images) for each in (torch.from_numpy(part[view]), texts[n])]
        found += zip(stored, again, strict=True)
    return found
