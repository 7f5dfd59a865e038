"""Upload of an exported folder to the Hugging Face hub."""

from pathlib import Path


def upload(folder: Path, repository: str, *, private: bool) -> str:
    """Make the repository if there is none, upload the whole folder as one commit; returns its address.

    Raises: ValueError with what the hub says; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export by clipkd"))
    except Exception as error:  # its own errors, its validators' and those of whatever HTTP library it uses
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{folder} is written, but the hub did not take it as {repository}: {reason}; "
            f"upload it later with: hf upload {repository} {folder}"
        ) from error
