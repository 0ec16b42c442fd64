"""The commands of the data room: their help's examples work as pasted."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from tokenizer.cli import main
from tokenizer.demo import ASSET, CLIP, PHOTOGRAPH


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(words)
    printed = capsys.readouterr()
    assert not end.value.code, (words, printed.err)
    return printed.out


@pytest.mark.parametrize(
    "command",
    ["shard images", "shard videos", "shard assets", "data teach", "data show", "data check", "tokenize"],
)
def test_examples_work_as_pasted(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "atoken-demo").mkdir()
    for source in (PHOTOGRAPH, CLIP, ASSET):  # what the first line of most examples makes
        shutil.copy(source, tmp_path / "atoken-demo")
    lines = run([*command.split(), "--help"], capsys).splitlines()
    examples = [shlex.split(line) for line in lines if line.startswith("    atoken ")]
    assert examples
    assert any(example[1:].count(command.split()[-1]) for example in examples)
    for example in examples:
        if example[1] != "demo":
            run(example[1:], capsys)


def test_sets_are_listed_with_their_licences(capsys: pytest.CaptureFixture[str]) -> None:
    listed = run(["data", "list"], capsys)
    rows = json.loads(run(["data", "list", "--json"], capsys))["sets"]
    assert {"emoji", "furniture", "games", "photographs", "clips", "fashion"} <= {row["name"] for row in rows}
    for row in rows:
        assert f"{row['name']}: {row['kind']}" in listed
        assert row["licence"] in listed
        assert row["installed"] or row["install"]


def test_the_group_without_a_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["data"])
    printed = capsys.readouterr()
    assert "build" in printed.out + printed.err
