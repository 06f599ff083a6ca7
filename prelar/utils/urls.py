"""Where stores may be published: the one check of `data_root`, pointers and URLs of stores."""

from __future__ import annotations

from urllib.parse import urlsplit

SCHEMES = ("s3", "gs", "file")


def check_url(url: str) -> None:
    """Raise `ValueError` unless `url` is an absolute folder, or a plain URL of one of `SCHEMES`.

    A URL may chain no other (`::`) and holds no credentials, query or fragment; that of a folder has no host.
    What the error says has nothing of the URL but its scheme, so no secret either.
    """
    scheme, found, _ = url.partition("://")
    if not url.isprintable() or "::" in url:
        raise ValueError("a chain of URLs, or unprintable; give one plain URL")
    if found and scheme not in SCHEMES:
        kinds = ", ".join(f"{kind}://" for kind in SCHEMES)
        raise ValueError(f"{scheme[:20]}:// is no kind of storage for stores; give {kinds} or a folder")
    if not found and not url.startswith("/"):
        raise ValueError("neither an absolute folder nor a URL such as s3://bucket/prefix")
    parts = urlsplit(url if found else "/")
    if scheme == "file" and not url.startswith("file:///"):
        raise ValueError("a file:// URL has three slashes and an absolute folder, as file:///data/stores")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("give the URL alone; credentials come from the environment")
