"""`capstan push`: it exports a run's checkpoint and uploads it to the Hugging Face Hub in one commit.

The files are exported to a temporary folder, byte for byte the same at every call. The Hub keeps large files by their
hashes, and makes them visible with the commit at the end. After a push that was killed the repository is unchanged, and
the same command uploads only what is not there yet.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from launcher.export.export import Exported, export_run
from trainer.base.find.small_files import TOKENIZER_PATTERNS
from trainer.errors import ConfigError, StorageError, Unreachable
from trainer.export.card import PLACE
from trainer.export.format import CARD
from trainer.run.folder import name_of
from trainer.store.scratch import scratch_folder
from trainer.store.store import Store
from trainer.store.tokenizer_files import NAMED_TEMPLATES

_TARGET = re.compile(r"hf://([\w.-]+/[\w.-]+)")
_TOKEN = "HF_TOKEN"
_TOKENS_PAGE = "huggingface.co/settings/tokens"
# A program would load these files of an earlier export beside the new ones, or in place of them.
_LOADED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.gguf",
    "adapter_config.json",
    "adapter_model.bin",
    "config.json",
    "generation_config.json",
    *TOKENIZER_PATTERNS,
)


@dataclass(frozen=True)
class Pushed:
    """The commit that was made. A dry run has none, and `private` is what the repository would be made as."""

    repository: str
    revision: str
    private: bool
    exported: Exported
    url: str | None = None
    commit: str | None = None

    def sentence(self) -> str:
        what = self.exported.what
        if self.url is None:
            kind = "private" if self.private else "public"
            return (
                f"would push {what} of step {self.exported.step} to hf://{self.repository}@{self.revision}, a {kind}"
                " repository unless it is there already (dry run: nothing was sent)"
            )
        return "\n".join([f"{what} of step {self.exported.step} is in {self.url}", *self.exported.remarks])


def push_run(
    folder: Store,
    target: str,
    format: str,
    options: Sequence[str] = (),
    *,
    step: int | None,
    revision: str | None,
    public: bool,
    dry_run: bool,
    log: Callable[[str], None],
) -> Pushed:
    """Export `step`, or the newest whole checkpoint, and upload it to `target`, hf://owner/name.

    Raises:
        ConfigError: `target` is no repository, or a public one without `public`; there is no token in HF_TOKEN, or it
            may not write there; or `export_run` raises it.
        StorageError: the Hub cannot be reached, or fails.
    """
    repository, branch = _repository(target), revision or constants.DEFAULT_REVISION
    with scratch_folder("push") as scratch:
        directory = Path(scratch, "export")
        if dry_run:
            exported = export_run(folder, str(directory), format, options, step=step, dry_run=True)
            return Pushed(repository, branch, not public, exported)
        api = HfApi(token=_token())
        with _explained(repository):  # before the export, which may take an hour
            api.create_repo(repository, private=not public, exist_ok=True)
            private = bool(api.repo_info(repository).private)
            if not (private or public):
                raise ConfigError(
                    f"hf://{repository} is there already, and everybody can read it. Give --public if that is meant, or"
                    " name another repository."
                )
            if revision:
                api.create_branch(repository, branch=revision, exist_ok=True)
        exported = export_run(folder, str(directory), format, options, step=step)
        card = (directory / CARD).read_text(encoding="utf-8")
        (directory / CARD).write_text(card.replace(f'"{PLACE}"', f'"{repository}"'), encoding="utf-8")
        size = sum(path.stat().st_size for path in directory.iterdir())
        log(
            f"uploading {size / 1e6:,.1f} MB to hf://{repository}; a push that is killed goes on when it is called"
            " again"
        )
        with _explained(repository):
            message = f"Step {exported.step} of the run {name_of(folder)}, by Capstan"
            # `upload_folder` is not used: it makes several commits if hf_xet is installed.
            operations = _operations(directory, api.list_repo_files(repository, revision=revision))
            made = api.create_commit(repository, operations, commit_message=message, revision=revision)
    return Pushed(repository, branch, private, exported, f"{api.endpoint}/{repository}", made.oid)


def _repository(target: str) -> str:
    match = _TARGET.fullmatch(target.rstrip("/"))
    if match is None:
        raise ConfigError(f"{target!r} is no repository of the Hub. Give hf://OWNER/NAME; --revision names a branch.")
    try:
        validate_repo_id(match[1])
    except HFValidationError as error:
        raise ConfigError(f"{target!r} is no repository of the Hub: {error} Give another name.") from error
    return match[1]


def _operations(folder: Path, there: Iterable[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Replace those files of an earlier export that are `there` with the files of `folder`. All other files stay."""
    new = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    old = [name for name in there if name not in new and any(fnmatch(name, pattern) for pattern in _LOADED)]
    return [
        *(CommitOperationAdd(name, path) for name, path in new.items()),
        *(CommitOperationDelete(name) for name in old if "/" not in name or name.startswith(f"{NAMED_TEMPLATES}/")),
    ]


def _token() -> str:
    token = os.environ.get(_TOKEN, "").strip()
    if not token:
        raise ConfigError(
            f"capstan push needs a token that may write to the Hub, in {_TOKEN}. Make one: {_TOKENS_PAGE}."
        )
    return token


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Wrap calls of the Hub, whose errors become ours."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConfigError("capstan push needs the network, and HF_HUB_OFFLINE is set. Unset it.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = (error.server_message or str(error)).strip().splitlines()[0].rstrip(".")
        if status in (401, 403, 404):
            raise ConfigError(
                f"the token in {_TOKEN} may not write to hf://{repository}: {said} ({status}). Give it that right, or"
                f" take another: {_TOKENS_PAGE}."
            ) from error
        raise StorageError(f"the Hub did not take hf://{repository}: {said} ({status}). Call push again.") from error
    except (OSError, httpx2.TransportError) as error:
        raise Unreachable(f"the Hub cannot be reached: {error}. Call push again; what is uploaded stays.") from error
    except ValueError as error:  # the Hub's rules do not allow the model card's metadata
        raise ConfigError(f"hf://{repository} does not take the export: {error}.") from error
