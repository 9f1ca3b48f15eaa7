"""The Hugging Face hub: where a finished set is uploaded, by the hub's own library."""

from pathlib import Path
from typing import Any

from kspec_guidance.synthesis.errors import RunFailedError, SynthesisError

__all__ = ["HubUpload"]

IGNORED = [".kspec/**", ".cache/**", ".*.tmp", "**/.*.tmp"]  # the state of the run, and what a killed one left
MANY_FILES = 100_000  # more than the hub advises for one repository


class HubUpload:
    """Uploads a folder to a dataset repository.

    Args:
        repo: ``user/name``.

    Raises:
        SynthesisError: for a name that the hub does not take, in offline mode, or without a token.
    """

    def __init__(self, repo: str):
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise SynthesisError(
                f"push_to_hub is a repository of the hub, such as user/name, got {repo!r} ({error})"
            ) from error
        if constants.HF_HUB_OFFLINE:
            raise SynthesisError("push_to_hub needs the hub, and HF_HUB_OFFLINE is set; unset it")
        if get_token() is None:
            raise SynthesisError(
                f"push_to_hub {repo} needs a token that may write: run `hf auth login`, or set the variable HF_TOKEN"
            )
        self.repo, self.api = repo, HfApi()

    @property
    def url(self) -> str:
        """Of the page of the set."""
        return f"{self.api.endpoint}/datasets/{self.repo}"

    def prepare(self, images: int, kind: str) -> None:
        """Create the repository, or find that it may be written to, before images are made.

        Args:
            images: that will be made.
            kind: ``imagefolder``, ``webdataset`` or ``parquet``.

        Raises:
            SynthesisError: if the hub refuses it, or for more files than it takes.
        """
        if kind == "imagefolder" and images > MANY_FILES:
            raise SynthesisError(
                f"the hub takes about {MANY_FILES:,} files in a repository, and this set would have {images:,}; give "
                "format='webdataset' or 'parquet' (--format)"
            )
        try:
            self.repo = self.api.create_repo(self.repo, repo_type="dataset", exist_ok=True).repo_id
        except Exception as error:  # of the connection, the hub, or its library
            raise SynthesisError(
                f"cannot create or find the dataset {self.repo} at {self.api.endpoint}: {_short(error)}"
            ) from error

    def push(self, folder: Path) -> str:
        """Upload a finished set; files that are there already are not sent again.

        Returns:
            The URL of its page.

        Raises:
            RunFailedError: if it fails.
        """
        try:
            self.api.upload_folder(
                repo_id=self.repo, folder_path=folder, repo_type="dataset", ignore_patterns=IGNORED,
                commit_message="Upload a set of generated images",
            )  # fmt: skip
        except Exception as error:  # of the connection, the hub, or its library
            raise RunFailedError(
                f"cannot upload {folder} to {self.url}: {_short(error)}; the set is finished, and the same "
                "command uploads it"
            ) from error
        return self.url


def _short(error: Any) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:297] + '...'}"
