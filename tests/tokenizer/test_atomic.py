"""Files and folders appear whole or not at all, whatever stands in their place."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenizer.atomic import atomic_path


def write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_folder(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.mkdir()
        (temporary / "file").write_text(text)


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name, put in (("file.txt", write), ("folder", write_folder)):
        target, link = tmp_path / "elsewhere" / name, tmp_path / f"link to {name}"
        link.symlink_to(target)
        for text in ("through a link to nothing yet", "through a link to the old one"):
            put(link, text)
            assert link.is_symlink()
            assert (target / "file" if target.is_dir() else target).read_text() == text
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        *("elsewhere", "file", "file.txt", "folder", "link to file.txt", "link to folder")
    ]


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "folder", "old")
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError(5, "Input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Input/output error") as error:
        write_folder(tmp_path / "folder", "new")
    assert error.value.filename == str(tmp_path / "folder")
    assert (tmp_path / "folder" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_names_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 251 + ".txt")
    write(path, "whole")
    assert path.read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 1
