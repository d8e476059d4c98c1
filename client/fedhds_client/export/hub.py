"""An exported folder to a repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from fedhds.errors import UsageError


def push(folder: Path, repository: str, *, public: bool) -> str:
    """Uploads all files of `folder` in one commit and returns its address; makes a missing repository.

    The repository is private unless `public`: one that others can read is refused then. The token is the hub's own
    ($HF_TOKEN or `hf auth login`). Raises UsageError for what the hub refuses, naming the cure.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not get_token():
        raise UsageError("--push-to-hub: there is no token; set HF_TOKEN, or log in with `hf auth login`")
    hub = HfApi()
    try:
        hub.create_repo(repository, private=not public, exist_ok=True)
        if not public and not hub.repo_info(repository).private:
            raise UsageError(
                f"--push-to-hub: {repository} exists and everybody can read it; add --public, or name another"
            )
        commit = hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Adapter tuned by a federation"
        )
    except HFValidationError as error:
        raise UsageError(f"--push-to-hub: {repository!r} is no name of a repository; write OWNER/NAME") from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        cure = "check what the token may do" if code in (401, 403) else "try again later"
        raise UsageError(f"--push-to-hub: the hub refused {repository} with HTTP {code}; {cure}") from error
    except (HTTPError, OSError) as error:
        raise UsageError(
            f"--push-to-hub: the hub cannot be reached ({type(error).__name__}: {error}); check the network"
        ) from error
    return str(commit.commit_url)
