"""Whether the rest of a download belongs to what has been read of it, by the headers of HTTP (RFC 9110, 13 and 14)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class Version:
    """What tells one version of a file on a server from another; empty where the server says nothing.

    tag: ETag. modified: Last-Modified. length: Content-Length.
    """

    tag: str
    modified: str
    length: str

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> Version:
        """Of the response with the whole file; that of a compressed one is nothing, since its bytes are not those that
        ranges count."""
        if _is_compressed(headers):
            return cls("", "", "")
        return cls(*(headers.get(name, "") for name in ("ETag", "Last-Modified", "Content-Length")))

    @property
    def condition(self) -> str:
        """For If-Range, which allows no weak tags."""
        return self.modified if self.tag.startswith("W/") or not self.tag else self.tag

    def has_rest(self, headers: Mapping[str, str], position: int) -> bool:
        """Whether a partial response is the rest of this version from `position` on, to its end. Not every server heeds
        If-Range, caches answer with what they have, and some send less than they were asked for."""
        where = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
        if where is None or int(where[1]) != position or where[3] not in (self.length or where[3], "*"):
            return False
        length = self.length if where[3] == "*" else where[3]
        if length and int(where[2]) + 1 != int(length):
            return False
        if _is_compressed(headers):
            return False
        tag, modified = headers.get("ETag", ""), headers.get("Last-Modified", "")
        if (tag and self.tag and tag != self.tag) or (modified and self.modified and modified != self.modified):
            return False
        # With nothing to be asked by, the server must have said the same again.
        return bool(self.condition or (tag and self.tag))


def _is_compressed(headers: Mapping[str, str]) -> bool:
    return headers.get("Content-Encoding", "identity") != "identity"
