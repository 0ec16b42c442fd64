"""Names of files in URLs. The query of a web URL belongs to the request: it is often a secret, and changes."""

from __future__ import annotations

from urllib.parse import quote, unquote, urlsplit


def path_parts(url: str) -> list[str]:
    """Folders and file of a path or URL, without its query; a `pipe:` is a path like any other."""
    return [unquote(part) for part in urlsplit(url).path.split("/")] if _is_web(url) else url.split("/")


def file_name(url: str) -> str:
    """ "shard-000012.tar". The query is a part of it only where the path names no file: "get?shard=12"."""
    name = path_parts(url)[-1]
    return url.rpartition("/")[2] if _is_web(url) and "." not in name and "?" in url else name


def file_beside(url: str, name: str) -> str:
    """Path or URL of another file in the folder of `url`, with the same query: what lets in to one lets in to both."""
    if not _is_web(url):
        return f"{url.rpartition('/')[0]}/{name}" if "/" in url else name
    parts = urlsplit(url)
    return parts._replace(path=f"{parts.path.rpartition('/')[0]}/{quote(name)}").geturl()


def file_inside(url: str, name: str) -> str:
    """Path or URL of a file in the folder that `url` is."""
    if not _is_web(url):
        return f"{url.rstrip('/')}/{name}"
    parts = urlsplit(url)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}").geturl()


def _is_web(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))
