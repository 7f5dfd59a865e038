"""Upload of an exported folder: what huggingface_hub is asked to do, and refusals."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from clipkd.export.command import check_repository, upload

ADDRESS = "https://hub.invalid/me/student/commit/1"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of the calls, in their order."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda _, name, **options: found.append({"name": name, **options}))
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **options: found.append(options) or ADDRESS)
    return found


@pytest.mark.parametrize("private", [True, False])
def test_the_folder_is_one_commit(calls: list[dict[str, Any]], tmp_path: Path, private: bool) -> None:
    assert upload(tmp_path, "me/student", private=private) == ADDRESS
    made, sent = calls
    assert made == {"name": "me/student", "private": private, "exist_ok": True}
    assert (sent["repo_id"], sent["folder_path"]) == ("me/student", tmp_path)


def test_a_refusal_names_the_folder_and_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **options: object) -> None:
        raise PermissionError("no rights in\nthis namespace")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    words = r"is written, but the hub did not take it as me/student: no rights in this namespace.*hf upload me/student"
    with pytest.raises(ValueError, match=words):
        upload(tmp_path, "me/student", private=True)


def test_wrong_names_and_a_missing_token_are_refused_before_the_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for repository, words in (("no/such/name", "no/such/name"), ("student", "USER/NAME"), ("me/student", "hf auth")):
        with pytest.raises(ValueError, match=words):
            check_repository(repository)
