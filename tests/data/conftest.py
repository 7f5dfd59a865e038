"""Indexes that cannot be stored beside their shard, and copies that datasets makes, stay within the test."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("user_cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "datasets")
    return folder
