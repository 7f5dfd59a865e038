"""`clipkd cache verify`: check that the files of a cache hold what was written."""

from dataclasses import dataclass
from pathlib import Path

from clipkd.teachers.store.manifest import read_manifest
from clipkd.teachers.store.reader import TeacherCache, find_faults


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    folder: str
    """Folder of a finished cache."""


def verify(config: VerifyConfig) -> list[str]:
    """Print what was checked, and return the problems. Raises: FileNotFoundError or ValueError if it is no finished cache."""
    folder = Path(config.folder)
    manifest = read_manifest(folder)
    print(f"{folder}: {TeacherCache(folder, manifest).describe()}")
    faults, num_files = find_faults(folder, manifest, trust=False), len(manifest.files())
    print(f"{num_files - len(faults)} of {num_files} files have their size and SHA-256")
    if faults:
        print("run the same clipkd cache command again to rebuild the damaged files")
    else:
        print(f"{manifest.num_samples - manifest.num_unusable:,} samples usable")
    return list(faults.values())
