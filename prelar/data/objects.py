"""Named byte objects below a URL, which is s3://, gs://, file:// or a plain folder.

An object appears whole or not at all. Credentials come from the environment, as each kind's library finds
them, and are never shown; what fails is told in one line, but for a full disk, which stays an `OSError`.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from prelar import files
from prelar.errors import UserError, one_line
from prelar.urls import check_url


class Objects:
    """The objects whose names begin with a URL. Safe from threads and after a fork."""

    def __init__(self, url: str) -> None:
        """Raises `UserError` for other kinds of URL than stores are published at; nothing is asked for."""
        try:
            check_url(url)
        except ValueError as error:
            raise UserError(f"{url.rpartition('@')[2]}: cannot be used ({error})") from None
        self.url = url.rstrip("/")

    def __str__(self) -> str:
        return self.url

    @property
    def local(self) -> Path | None:
        """The folder, where the URL names one of this machine."""
        system, base = self._place()
        return Path(base) if isinstance(system, LocalFileSystem) else None

    def sizes(self) -> dict[str, int]:
        """Bytes of every object there now, by name; empty where there is none."""
        with self._failing():
            system, base = self._place()
            system.invalidate_cache()
            found = system.find(base, detail=True)
            return {name[len(base) :].strip("/"): int(about["size"]) for name, about in found.items()}

    def size(self, name: str) -> int | None:
        """Bytes of an object, None where there is none."""
        with self._failing(name):
            system, base = self._place()
            try:
                about = system.info(f"{base}/{name}")
            except (FileNotFoundError, NotADirectoryError):
                return None
            return int(about["size"]) if about["type"] == "file" else None

    def read(self, name: str) -> bytes:
        """The bytes of an object. Raises `UserError` where there is none."""
        with self._failing(name):
            system, base = self._place()
            content: bytes = system.cat_file(f"{base}/{name}")
            return content

    def read_ranges(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Bytes `begin` to `end` of objects, each wanted as (name, begin, end), asked for all at once."""
        with self._failing(wanted[0][0] if wanted else ""):
            system, base = self._place()
            names = [f"{base}/{name}" for name, _, _ in wanted]
            begins, ends = [begin for _, begin, _ in wanted], [end for _, _, end in wanted]
            found: list[bytes] = system.cat_ranges(names, begins, ends, on_error="raise")
            return found

    def put(self, name: str, path: Path) -> None:
        """Make an object of a finished file, which is not written to any more."""
        with self._failing(name):
            if self.local:
                with files.atomic_file(self.local / name) as partial:
                    files.link(path, partial)
                return
            system, base = self._place()
            system.put_file(str(path), f"{base}/{name}")

    def put_bytes(self, name: str, content: bytes) -> None:
        """Make an object of some bytes."""
        with self._failing(name):
            if self.local:
                with files.atomic_file(self.local / name) as partial:
                    partial.write_bytes(content)
                return
            system, base = self._place()
            system.pipe_file(f"{base}/{name}", content)

    def _place(self) -> tuple[fsspec.AbstractFileSystem, str]:
        with self._failing():
            system, base = fsspec.core.url_to_fs(self.url)
            return system, str(base).rstrip("/")

    @contextlib.contextmanager
    def _failing(self, name: str = "") -> Iterator[None]:
        """Tell what any kind of storage raises in one line."""
        shown = f"{self.url}/{name}".rstrip("/")
        try:
            yield
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"{shown}: not there; check the URL, or build the store again") from None
        except (ImportError, ValueError) as error:
            raise UserError(f"{shown}: cannot be used ({_line(error)})") from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"{shown}: {_line(error)}; check the URL, the network and the credentials in the environment"
            ) from None


def _line(error: Exception) -> str:
    return one_line(error)[:300]
