"""A released folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from mm.config import ConfigError


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Upload `folder` as the model `repository` (ORG/NAME), made where there is none; its address.

    Raises ConfigError of one line, with what to do, where the hub cannot be reached or refuses; the folder stays.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ConfigError(f"--push {repository}: needs huggingface_hub; pip install huggingface_hub") from error
    api = HfApi()
    try:
        api.create_repo(repository, repo_type="model", private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="mm release")
    except Exception as error:  # whatever a client of the network raises
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ConfigError(
            f"--push {repository}: not uploaded ({first}); {folder} is written: log in with `hf auth login`, "
            f"then give the same command again, or `hf upload {repository} {folder}`"
        ) from error
    return f"https://huggingface.co/{repository}"


def check_name(repository: str) -> None:
    """Raises ConfigError unless it looks like ORG/NAME, before any work is done."""
    parts = repository.split("/")
    if len(parts) != 2 or not all(part and part.replace("-", "").replace("_", "").replace(".", "") for part in parts):
        raise ConfigError(f"--push {repository}: must be ORG/NAME, such as my-lab/emoji-clip")
