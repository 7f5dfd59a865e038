"""Features of frozen models on disk, row by row: what `clipkd cache` writes and `teacher.cache` trains from."""

from clipkd.feature_store.manifest import (
    CONFIG,
    DTYPES,
    MANIFEST,
    PLAN,
    Classes,
    FileRecord,
    Manifest,
    Shard,
    StudentText,
    TeacherRecord,
    augmentation_of,
    fingerprint,
    read_manifest,
    require_same,
    sources_of,
    to_json,
)
from clipkd.feature_store.reader import StoredTeacher, TeacherCache, find_faults, open_cache

__all__ = [
    "CONFIG",
    "DTYPES",
    "MANIFEST",
    "PLAN",
    "Classes",
    "FileRecord",
    "Manifest",
    "Shard",
    "StoredTeacher",
    "StudentText",
    "TeacherCache",
    "TeacherRecord",
    "augmentation_of",
    "find_faults",
    "fingerprint",
    "open_cache",
    "read_manifest",
    "require_same",
    "sources_of",
    "to_json",
]
