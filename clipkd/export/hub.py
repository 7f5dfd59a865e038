"""Upload an exported folder to the Hugging Face hub."""

from pathlib import Path

from clipkd.errors import short


def check_repository(repository: str) -> None:
    """Check before anything is written. Raises: ValueError if the name is invalid or no token is set."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repository)
    if "/" not in repository:
        raise ValueError(f"push_to_hub is {repository!r}; write USER/NAME")
    if get_token() is None:
        raise ValueError("push_to_hub needs a token of the hub: sign in with `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, repository: str, *, private: bool) -> str:
    """Upload the folder as one commit and return the commit's address; files of earlier uploads stay.

    private: visibility of the repository if it is created here. Raises: ValueError with the hub's reason.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export by clipkd"))
    except Exception as error:  # errors of the hub, its validators and its HTTP library
        reason = short(error)
        raise ValueError(
            f"{folder} is written, but the hub did not take it as {repository}: {reason}; "
            f"upload it later with: hf upload {repository} {folder}"
        ) from error
