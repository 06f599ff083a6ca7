"""Models and data sets of the Hugging Face Hub, by name: `org/name`. The extra `hub` brings the client.

`HF_ENDPOINT` names another server, `HF_HUB_OFFLINE=1` keeps to what was fetched before, and `HF_TOKEN`, or
`hf auth login`, opens what is private.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from prelar.utils.errors import UserError, extras_named, one_line, printable

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
PREFIX = "hub:"
"""Begins a data set's name in params.yaml: `hub:org/name@revision`."""


def is_name(text: object) -> bool:
    """Whether a text is the name of a repository, and not of a folder: its first part is none here."""
    return isinstance(text, str) and bool(NAME.fullmatch(text)) and not Path(text.split("/")[0]).exists()


def fetch(
    name: str,
    *,
    revision: str | None,
    patterns: Sequence[str] | None = None,
    kind: Literal["model", "dataset"],
) -> Path:
    """The folder with a repository's files of a revision, fetched where they are not here yet.

    The folder is called as the commit is. patterns: of the files wanted, None: all. Raises `UserError` where
    they cannot be had.
    """
    with extras_named():
        from huggingface_hub import snapshot_download
    with hub_errors(name, revision):
        found = snapshot_download(
            name,
            repo_type=kind,
            revision=revision,
            allow_patterns=None if patterns is None else list(patterns),
            library_name="prelar",
        )
        return Path(found)


def data_set(path: str) -> Path:
    """The folder that a key of params.yaml names: `hub:org/name@revision` is fetched.

    Raises `UserError` where the name is none, or names no revision.
    """
    if not path.startswith(PREFIX):
        return Path(path)
    name, _, revision = path.removeprefix(PREFIX).partition("@")
    if not NAME.fullmatch(name) or not revision:
        raise UserError(f"{printable(path, 200)}: give hub:org/name@revision, a commit or a tag, which stays")
    return fetch(name, revision=revision, kind="dataset")


@contextlib.contextmanager
def hub_errors(name: str, revision: str | None = None) -> Iterator[None]:
    """Turn what the client raises, asked for a repository, into a `UserError`."""
    from huggingface_hub import errors

    asked = f"{name}@{revision}" if revision else name
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{asked}: its owner asks you to accept terms on its page, with your HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{asked}: no folder here, and no repository that the hub shows; if it is private, set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{asked}: the repository has no such revision; name a commit, a tag or a branch"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(
            f"{asked}: not fetched before, and the hub is not asked (HF_HUB_OFFLINE) or silent; go online"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "none"
        remedy = "set HF_TOKEN to a token that may" if status in (401, 403) else "try again later"
        raise UserError(f"{asked}: the hub refuses (status {status}); {remedy}") from None
    except Exception as error:  # of many kinds: of the client, and of what it talks with
        raise UserError(f"{asked}: cannot be had from the hub ({one_line(error)[:200]}); try again") from None
