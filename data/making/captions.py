"""What a file shows, as people leave it beside their files.

In this order, the first that knows a file counts for each of caption, label and other facts:

    a table         given by name, or metadata.csv or .jsonl in the folder (as Hugging Face's imagefolder has it):
                    column "file_name" (or "file"), "text" or "caption", "label", and any others, kept as facts
    NAME.txt        the caption
    NAME.json       "caption", "label", and others, kept as facts

With `labels="folder"` the folder that a file lies in names its class.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from data.samples import DEEPEST_FACTS, is_deeper, loads, whole_characters
from tokenizer.errors import InputError

Labels = Literal["none", "folder"]

TABLES = ("metadata.csv", "metadata.jsonl")
_FILE_COLUMNS = ("file_name", "file")
_CAPTION_COLUMNS = ("caption", "text")


@dataclass(frozen=True, slots=True)
class Captions:
    """Finds the facts of files below `root`.

    root: folder that names in the table are relative to.
    table: facts by such a name.
    """

    root: Path
    table: Mapping[str, Mapping[str, Any]]
    labels: Labels = "none"

    @classmethod
    def of(cls, root: Path, table: Path | None = None, labels: Labels = "none") -> Captions:
        """For the files below `root`.

        Args:
            table: .csv, .tsv or .jsonl; by default the one of `TABLES` in `root`, where there is one.

        Raises:
            InputError: a table that cannot be read, or has no column that names files.
        """
        if table is None:
            table = next((root / name for name in TABLES if (root / name).is_file()), None)
        rows = {} if table is None else dict(_read_table(table))
        return cls(root, rows, labels)

    def as_facts(self) -> dict[str, Any]:
        """What a set made with these is told apart by; nothing without table and labels. Words beside files are no
        part of it, as what the files hold is none."""
        facts: dict[str, Any] = {}
        if self.table:
            told = json.dumps({name: dict(row) for name, row in self.table.items()}, sort_keys=True)
            facts["captions"] = f"table of {len(self.table)} files, {hashlib.sha256(told.encode()).hexdigest()[:16]}"
        return facts | ({} if self.labels == "none" else {"labels_from": self.labels})

    def facts(self, file: Path) -> dict[str, Any]:
        """Caption ("caption"), class ("label") and whatever else is known; may be empty.

        Raises:
            InputError: a caption or facts beside the file that cannot be read.
        """
        facts: dict[str, Any] = {}
        if self.labels == "folder" and file.parent != self.root:
            facts["label"] = file.parent.name
        if (beside := file.with_suffix(".json")).is_file() and beside != file:
            facts |= _object(beside, _text(beside))
        if (beside := file.with_suffix(".txt")).is_file():
            facts["caption"] = _text(beside).strip()
        facts |= self.table.get(file.relative_to(self.root).as_posix(), {})
        if (caption := facts.get("caption")) is not None:
            if isinstance(caption, list | dict):
                raise InputError(f"{file}: its caption must be text, not {caption!r}")
            facts["caption"] = whole_characters(str(caption))
        return facts


def _read_table(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = _text(path)
    if path.suffix.lower() == ".jsonl":
        # Not splitlines(), which also cuts at separators that JSON allows within text (U+2028, U+0085).
        rows = [_object(path, line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    elif path.suffix.lower() in (".csv", ".tsv"):
        separator = "\t" if path.suffix.lower() == ".tsv" else ","
        rows = list(_csv_rows(path, text, separator))
    else:
        raise InputError(f"{path}: captions come as .csv, .tsv or .jsonl")
    for number, row in enumerate(rows, 1):
        name = next((row.pop(column) for column in _FILE_COLUMNS if row.get(column)), None)
        if name is None:
            raise InputError(
                f"{path}: row {number} names no file; a column must be called {' or '.join(_FILE_COLUMNS)}"
            )
        caption = next((row.pop(column) for column in _CAPTION_COLUMNS if row.get(column)), None)
        facts = {str(key): value for key, value in row.items() if key is not None and value not in (None, "")}
        # As files are asked for: "./a.png" is "a.png".
        yield PurePosixPath(str(name)).as_posix(), facts | ({} if caption is None else {"caption": caption})


def _csv_rows(path: Path, text: str, separator: str) -> Iterator[dict[str, Any]]:
    # Strict: else a quotation mark that nothing closes takes all rows up to the next one into its caption.
    # Spaces behind a comma are no part of a name: " text" would be a fact of that name, and no caption.
    reader = csv.DictReader(io.StringIO(text), delimiter=separator, strict=True, skipinitialspace=True)
    line = 1
    try:
        _ = reader.fieldnames  # reads the head
        line += reader.line_num
        for row in reader:
            yield dict(row)
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{path}: the row from line {line} on is no row ({error}); a caption that begins with a quotation mark "
            'stands in quotation marks, and has its own doubled: """Hello"", she said"'
        ) from None


def _object(path: Path, text: str, line: int | None = None) -> dict[str, Any]:
    where = f"{path}" if line is None else f"{path}: line {line}"
    try:
        value = loads(text)  # as readers of the shard will: what they do not have is not to be written
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not readable as JSON ({' '.join(str(error).split())})") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be a JSON object")
    if is_deeper(value, DEEPEST_FACTS):
        raise InputError(f"{where}: lists or objects within each other, more than {DEEPEST_FACTS} deep")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets put a mark in front of UTF-8
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
