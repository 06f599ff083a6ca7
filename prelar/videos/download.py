"""Downloads that continue where they broke off.

A part grows as `<name>.partial` beside a note of what the server said of it (length, ETag, Last-Modified) and
is renamed when it is whole. After a break the rest is asked for with Range; where the server ignores that, or
the file has changed meanwhile, the download starts anew. Headers and cookies come from the environment
(`PRELAR_HTTP_HEADERS`, a "Name: value" a line; `PRELAR_HTTP_COOKIES`), go only to the host that the URL
names, and neither they nor a URL's query are ever shown.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

from prelar.utils import disk, files
from prelar.utils.errors import UserError

HEADERS = "PRELAR_HTTP_HEADERS"
COOKIES = "PRELAR_HTTP_COOKIES"
PARALLEL = 4
ATTEMPTS = 8
REDIRECTS = 5
LARGEST = 64 << 30
"""Bytes of a file whose length the server does not tell."""

_HEADER_VALUE = re.compile(r"[\t -~]*")
_WEB_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+)?html\b", re.IGNORECASE)

Progress = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long a download waits: seconds without a byte, and the growing pause between attempts.

    An attempt that brings fewer than `slowest` bytes a second for `silence` seconds is given up.
    """

    silence: float = 60.0
    slowest: float = 1024.0
    pause: float = 1.0
    longest: float = 60.0


class _Broken(Exception):
    """An attempt failed in a way that another attempt may mend."""


class _Slow(Exception):
    """An attempt brings next to nothing."""


class _Changed(Exception):
    """What is held does not belong to what the server has now."""


def secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """Headers to send, from the environment. Raises `UserError` without repeating what was given."""
    found = {}
    for number, line in enumerate(environ.get(HEADERS, "").splitlines(), 1):
        if line.strip():
            name, _, value = (part.strip() for part in line.partition(":"))
            if ":" not in line or not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
                raise UserError(f"{HEADERS}: line {number} is not of the form `Name: value`")
            if not _HEADER_VALUE.fullmatch(value):
                raise UserError(f"{HEADERS}: line {number} holds characters that no HTTP header may have")
            found[name] = value
    if cookies := environ.get(COOKIES, "").strip():
        if not _HEADER_VALUE.fullmatch(cookies):
            raise UserError(f"{COOKIES}: holds a line break or other characters that no HTTP header may have")
        found["Cookie"] = cookies
    return found


def shown(url: str) -> str:
    """A URL as it may be shown: without user, password, query and fragment."""
    parsed = httpx.URL(url)
    return f"{parsed.scheme}://{parsed.host}{f':{parsed.port}' if parsed.port else ''}{parsed.path}"


def target_name(position: int, url: str) -> str:
    """The file name under which URL `position` of the list is kept. Raises `UserError` where it is none."""
    try:
        path = httpx.URL(url).path
    except httpx.InvalidURL:
        raise UserError(f"ssv2.source: URL {position + 1} of the list is not one; mend it") from None
    name = re.sub(r"[^A-Za-z0-9._-]", "_", path.rsplit("/", 1)[-1])[-100:]
    return name if name.strip("._-") else f"part-{position:02d}"


def fetch(
    urls: Sequence[str],
    folder: Path,
    *,
    headers: Mapping[str, str] | None = None,
    progress: Progress = lambda count: None,
    patience: Patience | None = None,
) -> list[Path]:
    """Download all `urls` into `folder`, several at a time, and return the files in the same order.

    What is whole already is not asked for again. `https://…#sha256=<hex>` checks the file's digest. Raises
    `UserError` as soon as one cannot be had, and stops the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    names = [target_name(position, url) for position, url in enumerate(urls)]
    if len(set(names)) < len(names):
        names = [f"part-{position:02d}" for position in range(len(urls))]
    downloads = [
        _Download(url, folder / name, headers or {}, progress, patience or Patience(), stop)
        for url, name in zip(urls, names, strict=True)
    ]
    with concurrent.futures.ThreadPoolExecutor(PARALLEL) as pool:
        running = [pool.submit(download.run) for download in downloads]
        try:
            for future in concurrent.futures.as_completed(running):
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return [download.target for download in downloads]


class _Download:
    """One file on its way."""

    def __init__(
        self,
        url: str,
        target: Path,
        headers: Mapping[str, str],
        progress: Progress,
        patience: Patience,
        stop: threading.Event,
    ) -> None:
        self.url, _, fragment = url.partition("#")
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"ssv2.source: {shown(url)!r} is not an http or https URL")
        self.digest = fragment.removeprefix("sha256=").lower() if fragment.startswith("sha256=") else None
        self.target = target
        self.partial = target.with_name(f"{target.name}.partial")
        self.note = target.with_name(f"{target.name}.note")
        self.headers = headers
        self.progress = progress
        self.patience = patience
        self.stop = stop

    def run(self) -> None:
        """Download, with as many attempts as it takes while any of them gets further."""
        if self.target.is_file():
            self.progress(self.target.stat().st_size)
            return
        self.progress(self._held())
        failures, pause = 0, self.patience.pause
        while True:
            before = self._held()
            try:
                self._attempt()
                self._complete()
                return
            except _Changed:
                self._forget()
                failures += 1
                reason = "the file keeps changing on the server"
            except _Slow as error:
                failures += 1
                reason = str(error)
            except (_Broken, httpx.TransportError) as error:
                grown = self._held() > before
                failures, pause = (0, self.patience.pause) if grown else (failures + 1, pause)
                reason = str(error) or type(error).__name__
            if failures >= ATTEMPTS:
                raise UserError(f"{shown(self.url)}: {reason}; run again to continue the download")
            self._pause(pause)
            pause = min(2 * pause, self.patience.longest)

    def _held(self) -> int:
        return self.partial.stat().st_size if self.partial.is_file() else 0

    def _forget(self) -> None:
        self.progress(-self._held())
        self.partial.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def _attempt(self) -> None:
        """One request, or one after each redirection; writes what it brings."""
        known = self._read_note()
        held = self._held()
        if held and not (known.get("etag") or known.get("modified") or known.get("length")):
            self._forget()
            held = 0
        if known.get("length") == held and held:
            return
        headers = {"Accept-Encoding": "identity"}
        if held:
            headers["Range"] = f"bytes={held}-"
        with httpx.Client(timeout=self.patience.silence, follow_redirects=False, trust_env=True) as client:
            url = httpx.URL(self.url)
            for _ in range(REDIRECTS + 1):
                own = self.headers if _origin(url) == _origin(httpx.URL(self.url)) else {}
                with client.stream("GET", url, headers={**own, **headers}) as answer:
                    if not answer.has_redirect_location:
                        self._take(answer, held, known)
                        return
                    url = url.join(answer.headers["Location"])
                    if url.scheme not in ("http", "https"):
                        raise UserError(f"{shown(self.url)}: redirects to {url.scheme}:; check the URL")
        raise UserError(f"{shown(self.url)}: redirects more than {REDIRECTS} times; check the URL")

    def _take(self, answer: httpx.Response, held: int, known: dict[str, str | int]) -> None:
        status = answer.status_code
        if status in (408, 425, 429) or status >= 500:
            self._wait(answer)
            raise _Broken(f"the server answers {status}")
        if status == 416:
            raise _Changed
        if status not in (200, 206):
            raise UserError(
                f"{shown(self.url)}: the server answers {status}; check the URL, and {HEADERS} or {COOKIES}"
            )
        if status == 206:
            begin, length = _content_range(answer)
            offset = held
        else:
            begin, offset = 0, 0
            length = _length(answer)
        now = _validators(answer, length)
        if status == 206 and (begin != held or any(now.get(key) != known.get(key) for key in known)):
            raise _Changed
        if status == 200 or not held:
            self._forget()
            self._write_note(now)
        self._save(answer, offset, length)

    def _save(self, answer: httpx.Response, offset: int, length: int | None) -> None:
        disk.require(self.target.parent, (length or offset) - offset, "the rest of a download")
        with self.partial.open("r+b" if offset else "wb") as handle:
            handle.seek(offset)
            handle.truncate()
            begun, count = time.monotonic(), 0
            for block in answer.iter_raw():
                self._check()
                handle.write(block)
                offset, count = offset + len(block), count + len(block)
                self.progress(len(block))
                if length is not None and offset > length:
                    raise _Changed
                if offset > LARGEST and length is None:
                    raise UserError(
                        f"{shown(self.url)}: the server tells no length, and sends more than "
                        f"{LARGEST >> 30} GiB; check the URL, and remove {self.partial}"
                    )
                if (lasted := time.monotonic() - begun) > self.patience.silence:
                    if count < self.patience.slowest * lasted:
                        raise _Slow(f"the server sends {count} bytes in {lasted:.0f} s")
                    begun, count = time.monotonic(), 0
        if length is not None and offset < length:
            raise _Broken(f"broke off after {offset} of {length} bytes")

    def _wait(self, answer: httpx.Response) -> None:
        after = answer.headers.get("Retry-After", "")
        if re.fullmatch(r"[0-9]{1,9}", after):
            self._pause(min(int(after), self.patience.longest))

    def _pause(self, seconds: float) -> None:
        self.stop.wait(seconds)
        self._check()

    def _check(self) -> None:
        """Give up where another download has failed or the user has interrupted."""
        if self.stop.is_set():
            raise UserError(f"{shown(self.url)}: stopped; run again to continue the download")

    def _complete(self) -> None:
        """Give the whole file its name. Raises `UserError` where it is not what was asked for."""
        with self.partial.open("rb") as handle:
            if _WEB_PAGE.match(handle.read(1024)):
                self._forget()
                raise UserError(
                    f"{shown(self.url)}: the server sends a web page, not a file; check the URL, and "
                    f"{HEADERS} or {COOKIES}"
                )
        if self.digest and (found := files.digest(self.partial)) != self.digest:
            self._forget()
            raise UserError(f"{shown(self.url)}: sha256 is {found}, expected {self.digest}; check the URL")
        files.sync(self.partial)
        self.partial.replace(self.target)
        files.sync(self.target.parent)
        self.note.unlink(missing_ok=True)

    def _read_note(self) -> dict[str, str | int]:
        try:
            content = json.loads(self.note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _write_note(self, content: dict[str, str | int]) -> None:
        files.write_text(self.note, json.dumps(content))


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _validators(answer: httpx.Response, length: int | None) -> dict[str, str | int]:
    """What tells this version of the file from another."""
    given = {
        "etag": answer.headers.get("ETag"),
        "modified": answer.headers.get("Last-Modified"),
        "length": length,
    }
    return {key: value for key, value in given.items() if value is not None}


def _length(answer: httpx.Response) -> int | None:
    """Length of a whole answer, None where the server does not tell."""
    length = answer.headers.get("Content-Length")
    if length is not None and not re.fullmatch(r"[0-9]{1,18}", length):
        raise _Broken("the server tells a Content-Length that is no number of bytes")
    return None if length is None else int(length)


def _content_range(answer: httpx.Response) -> tuple[int, int | None]:
    """First byte and whole length of a partial answer."""
    match = re.fullmatch(
        r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)", answer.headers.get("Content-Range", "")
    )
    if not match:
        raise _Changed
    return int(match[1]), None if match[2] == "*" else int(match[2])
