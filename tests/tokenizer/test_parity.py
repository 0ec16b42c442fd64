"""The recorded reference is reproduced, any other recording can be checked, and nothing wrong goes unnoticed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tokenizer.recordings import copy_part, other_recording, write_recording
from tokenizer.parity.__main__ import main
from tokenizer.parity.compare import Row, Rule, Value, compare
from tokenizer.parity.recording import Recording
from tokenizer.parity.runner import check

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows(golden: Path) -> list[Row]:
    """The whole recorded reference, checked once in float32 (its f64/ tensors in float64)."""
    return check(Recording(golden), CPU, torch.float32)


def failures(found: list[Row]) -> list[Row]:
    return [row for row in found if not row.passed]


# ---------------------------------------------------------------------- the recorded reference


def test_reference_is_reproduced(rows: list[Row]) -> None:
    assert failures(rows) == []


def test_every_tensor_was_compared_or_used(rows: list[Row], golden: Path) -> None:
    """Nothing is left out: one row for each tensor, and inputs are what README.json calls inputs."""
    listed = json.loads((golden / "README.json").read_text())["files"]
    expected = {(file, tensor) for file, entry in listed.items() for tensor in entry["tensors"]}
    assert {(row.file, row.tensor) for row in rows if row.tensor} == expected
    assert Counter(row.verdict for row in rows if row.tensor) == {"ok": 326, "input": 37}
    for row in rows:
        if row.verdict == "input":
            assert row.tensor.startswith("in.") or row.file in ("preprocess", "units"), row


def test_float64_agrees_far_better_than_asked(rows: list[Row]) -> None:
    """Wherever the recording kept float64, only the order of additions differs."""
    exact = [row for row in rows if row.tensor.startswith("f64/") and row.tolerance == 1e-9]
    assert len(exact) == 64
    assert max(row.error or 0.0 for row in exact) < 1e-12


def test_pixels_and_integers_are_exact(rows: list[Row]) -> None:
    names = (
        "feats",
        "coords",
        "fsq_indices",
        "fsq_quantized",
        "feats_u8",
        "i2s.video7.feats",
        "pi.none_uint8.feats768",
    )
    exact = [row for row in rows if row.tensor in names]
    assert len(exact) >= len(names)
    assert all(row.error == 0.0 and row.tolerance == 0.0 for row in exact)


def test_bfloat16_stays_within_its_tolerance(golden: Path, tmp_path: Path) -> None:
    part = copy_part(golden, tmp_path / "part", ["state_soc", "images", "images_fsq"])
    found = check(Recording(part), CPU, torch.bfloat16)
    assert failures(found) == []
    rec = next(row for row in found if (row.file, row.tensor) == ("images", "rec"))
    assert (rec.dtype, rec.measure) == ("bfloat16", "rms/std")
    assert 1e-3 < (rec.error or 0.0) < 2e-2  # it was indeed computed in bfloat16


# ---------------------------------------------------------------------- another configuration


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return other_recording(tmp_path_factory.mktemp("other"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_configuration_is_checked_without_a_change(other: Path, dtype: torch.dtype) -> None:
    found = check(Recording(other), CPU, dtype)
    assert failures(found) == []
    assert {row.file for row in found} >= {"pictures", "codes", "clip", "blob", "splats", "splats_ply", "parts"}


def test_sod_uses_weights_of_its_own(other: Path) -> None:
    recording = Recording(other)
    recording.readme["sod_shares_soc_weights"] = True
    assert recording.weights_of("sod").name == "state_sod"
    del recording.files["state_sod"]
    assert recording.weights_of("sod").name == "state_soc"
    wrong = {row.file for row in failures(check(recording, CPU, torch.float32))}
    assert wrong == {"codes"}


# ---------------------------------------------------------------------- what is wrong is found


def spoil(folder: Path, name: str, change: Callable[[dict[str, Tensor]], object], *, honest: bool = True) -> None:
    """Change a file; an honest change comes with the checksum and listing that belong to it."""
    path = folder / f"{name}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    if honest:
        readme = json.loads((folder / "README.json").read_text())
        readme.pop("sha256")
        kinds = {key: [str(t.dtype).removeprefix("torch."), list(t.shape)] for key, t in tensors.items()}
        readme["files"][name]["tensors"] = kinds
        (folder / "README.json").write_text(json.dumps(readme))


@pytest.fixture
def units(golden: Path, tmp_path: Path) -> Path:
    """A small recording to spoil: the single parts."""
    return copy_part(golden, tmp_path / "units", ["units"])


def verdicts(folder: Path) -> dict[str, str]:
    return {row.tensor: row.verdict for row in failures(check(Recording(folder), CPU, torch.float32))}


@pytest.mark.parametrize(
    ("tensor", "size"), [("rope72.k_out", 1e-3), ("ape96.out", 1e-3), ("f64/rope16.q_out", 1e-7), ("fsq.indices", 1)]
)
def test_one_wrong_number_is_found(units: Path, tensor: str, size: float) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[tensor].view(-1)[7] += size

    spoil(units, "units", change)
    assert verdicts(units) == {tensor: "out of tolerance"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_recording_that_is_not_finite_never_passes(units: Path, value: float) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["rope72.k_out"][3, 0, 0] = value

    spoil(units, "units", change)
    assert verdicts(units) == {"rope72.k_out": "out of tolerance"}


def test_unknown_tensors_are_unchecked(units: Path) -> None:
    spoil(units, "units", lambda tensors: tensors.update({"mystery": torch.zeros(3), "in.mystery": torch.zeros(3)}))
    assert verdicts(units) == {"mystery": "unchecked", "in.mystery": "unused input"}


def test_units_without_their_inputs_are_unchecked_and_the_rest_is_not(units: Path) -> None:
    spoil(units, "units", lambda tensors: tensors.pop("qknorm.gamma"))
    assert verdicts(units) == {"qknorm.out": "unchecked", "qknorm.in": "unchecked"}


def test_inputs_may_lie_in_another_file(other: Path, tmp_path: Path) -> None:
    """A file of inputs alone, read by one that comes later."""
    files = {name: load_file(other / f"{name}.safetensors") for name in ("state_sod", "codes", "pictures")}
    pictures = files.pop("pictures")
    files["a_inputs"] = {name: pictures[name] for name in ("in.image0", "in.image1")}
    notes = {"codes": "model sod on a_inputs:in.image1, a_inputs:in.image0"}
    configs = json.loads((other / "README.json").read_text())["configs"]
    part = write_recording(tmp_path / "part", files, notes, configs=configs)
    found = check(Recording(part), CPU, torch.float32)
    assert failures(found) == []
    assert [row.verdict for row in found if row.file == "a_inputs"] == ["ok", "input", "input"]


def test_wrong_shapes(units: Path) -> None:
    spoil(units, "units", lambda tensors: tensors.update({"offset_perturbation.8": torch.zeros(7, 3)}))
    assert verdicts(units) == {"offset_perturbation.8": "wrong shape"}


def test_listing_and_file_must_agree(units: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["ape64.out"]
        tensors["extra"] = torch.zeros(2)
        tensors["fsq.levels"] = tensors["fsq.levels"].long()

    spoil(units, "units", change, honest=False)
    found = verdicts(units)
    assert found[""] == "bad file"  # the checksum differs
    assert found["ape64.out"] == "missing"
    assert found["extra"] == "not as listed"
    assert found["fsq.levels"] == "not as listed"


def test_files_must_be_there_and_described(units: Path) -> None:
    readme = json.loads((units / "README.json").read_text())
    readme["files"]["absent"] = {"note": "", "tensors": {}}
    (units / "README.json").write_text(json.dumps(readme))
    save_file({"a": torch.zeros(1)}, units / "stranger.safetensors")
    (units / "broken.safetensors").write_bytes(b"not a safetensors file")
    found = {row.file: row for row in failures(check(Recording(units), CPU, torch.float32)) if not row.tensor}
    assert {file: row.detail.split(":")[0] for file, row in found.items()} == {
        "absent": "missing",
        "stranger": "README.json does not describe this file",
        "broken": "unreadable",
    }


def test_weights_that_do_not_fit_leave_nothing_checked(golden: Path, tmp_path: Path) -> None:
    part = copy_part(golden, tmp_path / "part", ["state_soc", "video_v9"])
    spoil(part, "state_soc", lambda tensors: tensors.update({"encoder.odd": torch.zeros(1)}))
    found = failures(check(Recording(part), CPU, torch.float32))
    assert all("do not fit its configuration: encoder.odd" in row.detail for row in found)
    files = Recording(part).files.values()
    assert {(row.file, row.tensor) for row in found} == {(file.name, name) for file in files for name in file.tensors}


def test_training_weights_of_the_reference_are_ignored(golden: Path, tmp_path: Path) -> None:
    part = copy_part(golden, tmp_path / "part", ["state_gs", "gs_exact8"])
    spoil(part, "state_gs", lambda tensors: tensors.update({"lpips_loss.net.lin0.weight": torch.zeros(1)}))
    found = check(Recording(part), CPU, torch.float32)
    assert failures(found) == []
    assert [row.tensor for row in found if row.verdict == "ignored"] == ["lpips_loss.net.lin0.weight"]


def test_a_tiling_this_project_refuses_is_told(golden: Path, tmp_path: Path) -> None:
    part = copy_part(golden, tmp_path / "part", ["state_soc", "video_v33"])
    spoil(part, "video_v33", lambda tensors: tensors.update({"rec_kv_s16_c8": tensors["rec"].clone()}))
    (row,) = failures(check(Recording(part), CPU, torch.float32))
    assert (row.tensor, row.verdict) == ("rec_kv_s16_c8", "unchecked")
    assert "tile stride 16 + context 8" in row.detail


# ---------------------------------------------------------------------- comparing


def test_rounding_of_the_recording_is_not_our_error() -> None:
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4
    row = compare("file", "f64/rec", Value(exact), exact.float(), torch.float64, rounded=True)
    assert (row.verdict, row.error) == ("ok", 0.0)
    off = compare("file", "f64/rec", Value(exact + 1e-2), exact.float(), torch.float64, rounded=True)
    assert off.verdict == "out of tolerance"


def test_constants_are_compared_by_their_size() -> None:
    constant = torch.full((5,), 3.0)
    assert compare("f", "t", Value(constant + 1e-4), constant, torch.float32, rounded=False).verdict == "ok"
    assert compare("f", "t", Value(constant + 1e-3), constant, torch.float32, rounded=False).verdict != "ok"
    zero = torch.zeros(5)
    assert compare("f", "t", Value(zero), zero, torch.float32, rounded=False).verdict == "ok"


def test_codes_may_differ_in_half_precision_only() -> None:
    codes = torch.zeros(100, 8, dtype=torch.int32)
    other_codes = codes.clone()
    other_codes[0, :3] = 1
    for dtype, verdict in ((torch.float32, "out of tolerance"), (torch.bfloat16, "ok")):
        assert compare("f", "t", Value(other_codes, Rule.CODES), codes, dtype, rounded=False).verdict == verdict


# ---------------------------------------------------------------------- command


def test_command_prints_a_table(units: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(units)]) == 0
    output = capsys.readouterr().out
    assert "rope72.k_out" in output
    assert "max/std" in output
    assert output.strip().endswith("compared tensors agree")


def test_command_fails_with_status_1(units: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(units, "units", lambda tensors: tensors["ape96.out"].add_(0.1))
    assert main([str(units)]) == 1
    assert "the first is units:ape96.out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("only", "expected"),
    [("units:rope16.*_out", 2), ("units:f64/*", 6), ("units:ape64.pos", 1), ("unit?", 46)],
)
def test_only_some_tensors(units: Path, capsys: pytest.CaptureFixture[str], only: str, expected: int) -> None:
    assert main([str(units), "--json", "--only", only]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    assert len([row for row in report["rows"] if row["tensor"]]) == expected


def test_json_is_json_whatever_happens(units: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(units, "units", lambda tensors: tensors["ape96.out"].fill_(float("nan")))
    assert main([str(units), "--json"]) == 1

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    report = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert (report["passed"], report["device"], report["dtype"]) == (False, "cpu", "float32")
    bad = [row for row in report["rows"] if not row["passed"]]
    assert [(row["tensor"], row["error"], row["verdict"]) for row in bad] == [("ape96.out", None, "out of tolerance")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{empty}"], "not a recording, it has no README.json"),
        (["{empty}/absent"], "not a folder"),
        (["{foreign}"], "lacks 'files' or 'configs'"),
        (["{broken}"], "not readable as JSON"),
        (["{units}", "--only", "nothing:*"], "no tensor of"),
        (["{units}", "--device", "warp9"], "device 'warp9' cannot be used"),
    ],
)
def test_what_is_no_recording_is_one_line_and_status_2(
    units: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    folders = {name: tmp_path / name for name in ("empty", "foreign", "broken")}
    for folder in folders.values():
        folder.mkdir()
    (folders["foreign"] / "README.json").write_text('{"name": "something else"}')
    (folders["broken"] / "README.json").write_text("{")
    assert main([argument.format(units=units, **folders) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert output.err.count("\n") == 1
