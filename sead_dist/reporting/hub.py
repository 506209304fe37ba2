"""The upload of a finished model to the hub, and the checks before it.

huggingface_hub finds the token (HF_TOKEN, or a login). No file of ours holds it.
"""

import os
import re
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import (  # type: ignore[attr-defined] # not in its __all__, but documented
    disable_progress_bars,
    validate_repo_id,
)

from sead_dist.config.schema import RunConfig
from sead_dist.errors import RunError, UserError
from sead_dist.reporting.model_card import model_name
from sead_dist.reporting.run_files import read_run
from sead_dist.runtime.redact import without_secrets
from sead_dist.runtime.run_log import PUSHED, is_finished, write_json


def reason(error: BaseException) -> str:
    """An error in one line, without secrets."""
    return without_secrets(" ".join(f"{type(error).__name__}: {error}".split())[:400])


def reject_push(config: RunConfig, what: str) -> None:
    """Raises UserError where several runs would be uploaded, all to one repository."""
    if config.push_to_hub:
        raise UserError(
            f"push_to_hub=true is for one run of distill, not for {what}; upload a run when it is "
            "finished: sead-dist push RUN --to ID"
        )


NO_TOKEN = (
    "there is no token of the hub, and an upload needs one; run hf auth login, or set HF_TOKEN, "
    "{later}"
)
LATER = "or leave push_to_hub out and upload later: sead-dist push RUN"


def check_push_here(repo: str | None, later: str = LATER) -> None:
    """Check all that needs no network: the hub may be used, `repo` is a name, and there is a
    place that a token can come from. Arguments and errors are those of `check_push`."""
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"cannot reach the hub at {constants.ENDPOINT}: HF_HUB_OFFLINE is set; unset it, "
            f"{later}"
        )
    try:
        if repo is not None:
            validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(
            f"hub_model_id={repo} is not the name of a repository: {reason(error)}; give owner/name"
        ) from None
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE")
    if not any(map(os.environ.get, names)) and not Path(constants.HF_TOKEN_PATH).exists():
        raise UserError(NO_TOKEN.format(later=later))


def check_push(repo: str | None, later: str = LATER) -> None:
    """Check that a token is there, that the hub accepts it, and that its owner may write to `repo`
    ("owner/name", a bare name under the owner, or None). later: what else a person can do, for the
    message. Raises UserError."""
    check_push_here(repo, later)
    try:
        token = get_token()
    except Exception as error:  # a file that cannot be read; a login that is renewed over a network
        raise UserError(
            f"the token of the hub cannot be read: {reason(error)}; run hf auth login, {later}"
        ) from None
    if token is None:
        raise UserError(NO_TOKEN.format(later=later))
    try:
        account = HfApi().whoami()
    except HfHubHTTPError as error:
        raise UserError(
            f"the hub ({constants.ENDPOINT}) does not accept the token: {reason(error)}; "
            f"run hf auth login, {later}"
        ) from None
    except Exception as error:  # the connection's own kinds of error are many
        raise UserError(
            f"cannot reach the hub at {constants.ENDPOINT}: {type(error).__name__}; "
            f"check the network, {later}"
        ) from None
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(
            f"the token of {account['name']} permits reading only; give one that permits writing, "
            f"{later}"
        )
    owners = [account["name"], *(org["name"] for org in account.get("orgs", []))]
    owner = repo.split("/")[0] if repo is not None and "/" in repo else account["name"]
    if owner not in owners:
        raise UserError(
            f"hub_model_id={repo} has the owner {owner}, and the token of {account['name']} can "
            f"write for {', '.join(owners)}; give one of these as owner"
        )


def upload(run: Path, repo: str | None, private: bool | None) -> str:
    """Upload RUN/model with its card and plots, in one commit. Returns the address of the
    repository. A missing repository is made. Raises what huggingface_hub raises."""
    disable_progress_bars()
    api = HfApi()
    name = repo or re.sub(r"[^\w.-]+", "-", model_name(read_run(run)))
    made = api.create_repo(name, private=private, exist_ok=True)
    api.upload_folder(
        repo_id=made.repo_id, folder_path=run / "model", commit_message="Upload by sead_dist"
    )
    # where this record is missing, the run's command given again uploads the model
    write_json(run / PUSHED, {"repository": str(made)})
    return str(made)


def push_at_end(run: Path, config: RunConfig) -> str:
    """Upload a finished run. Returns a line to log, with the reason where the upload failed."""
    try:
        address = upload(run, config.hub_model_id, config.hub_private_repo)
    except Exception as error:
        return (
            f"the run is finished, but its upload failed: {reason(error)}; upload it later: "
            f"sead-dist push {run}"
        )
    return f"uploaded to {address}"


def push_run(run: Path, repo: str | None, private: bool | None) -> str:
    """Upload a finished run to `repo`, else to its own hub_model_id, else under the name on its
    card. Returns the address of the repository.

    Raises UserError for a folder that is not a finished run and a hub that cannot be written to,
    RunError where the upload fails.
    """
    if not is_finished(run):
        raise UserError(f"{run} is not a finished run; give a run directory with run_summary.json")
    config = read_run(run).config
    repo = repo or config.get("hub_model_id")
    private = config.get("hub_private_repo") if private is None else private
    check_push(repo, "then give the same command again")
    try:
        return upload(run, repo, private)
    except Exception as error:
        raise RunError(
            f"the upload of {run} failed: {reason(error)}; give the same command again"
        ) from error
