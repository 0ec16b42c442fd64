"""Gaussians in files and under edits: round trips, layouts of other programs, damage, and covariances that follow."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.gaussians import Gaussians, PlyWarning, crop, merge, read_ply, transform, write_ply
from tokenizer.gaussians.attributes import CHANNELS, rotation_matrices
from tokenizer.gaussians.edit import quaternion_of
from tokenizer.gaussians.ply import ply_columns

NAMES = (
    *"xyz",
    "f_dc_0",
    "f_dc_1",
    "f_dc_2",
    "opacity",
    *(f"scale_{i}" for i in range(3)),
    *(f"rot_{i}" for i in range(4)),
)


def some_gaussians(count: int = 7, seed: int = 0, dtype: torch.dtype = torch.float32) -> Gaussians:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 14, generator=generator, dtype=torch.float64).to(dtype)
    means, scales, quaternions, dc, logits = values.split(list(CHANNELS.values()), dim=1)
    return Gaussians(0.3 * means, torch.exp(scales - 4), quaternions, dc, 3 * logits, torch.tensor([count]))


def table_of(gaussians: Gaussians) -> dict[str, np.ndarray]:
    return {name: column.numpy() for name, column in ply_columns(gaussians).items()}


def binary(columns: dict[str, np.ndarray], kinds: str = "<f4", count: int | None = None, names: str = "float") -> bytes:
    """A file of one element, all columns of one kind."""
    length = len(next(iter(columns.values())))
    order = {"<": "binary_little_endian", ">": "binary_big_endian"}[kinds[0]]
    header = ["ply", f"format {order} 1.0", "comment by a test", f"element vertex {length if count is None else count}"]
    header += [f"property {names} {name}" for name in columns] + ["end_header\n"]
    return "\n".join(header).encode() + np.stack(list(columns.values()), axis=1).astype(kinds).tobytes()


def same(first: Gaussians, second: Gaussians, scale_error: float = 0.0) -> None:
    for name in CHANNELS:
        rtol = scale_error if name == "scales" else 0.0
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=rtol, atol=0, msg=name)


# ---------------------------------------------------------------------- round trips


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 40))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, seed: int, count: int) -> None:
    path = tmp_path_factory.mktemp("round") / "asset.ply"
    gaussians = some_gaussians(count, seed)
    write_ply(gaussians, path)
    first = path.read_bytes()
    back = read_ply(path)
    # Half a unit in the last place of the logarithm, which is less than 16 in size.
    same(back, gaussians, scale_error=2.0**-20)
    small = back.scales.max() < math.exp(-1)
    write_ply(back, path)
    assert (path.read_bytes() == first) or not small


def test_the_recorded_columns_come_back(golden: Path, tmp_path: Path) -> None:
    """A file with the values that the reference wrote: read, and written again, it is the same."""
    recorded = {name: column.numpy() for name, column in load_file(golden / "gs_ply.safetensors").items()}
    layout = list(table_of(some_gaussians(1)))
    path = tmp_path / "reference.ply"
    path.write_bytes(binary({name: recorded[name] for name in layout}))
    gaussians = read_ply(path)
    for name, column in table_of(gaussians).items():
        np.testing.assert_array_equal(column, recorded[name], err_msg=name)
    write_ply(gaussians, tmp_path / "again.ply")
    written, read = ((tmp_path / name).read_bytes().split(b"end_header\n", 1)[1] for name in ("again.ply", path.name))
    assert written == read


@pytest.mark.parametrize("pieces", [3, 65536])
@pytest.mark.parametrize("layout", ["<f4", "<f8", ">f4", ">f8", "ascii"])
def test_layouts_of_other_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, pieces: int) -> None:
    """Any order, type and byte order; no normals; columns and elements that mean nothing here, before and after."""
    monkeypatch.setattr("tokenizer.gaussians.plytable.PIECE", pieces)
    gaussians = some_gaussians(8)
    columns = {name: column for name, column in table_of(gaussians).items() if not name.startswith("n")}
    columns = dict(reversed([*columns.items(), ("confidence", np.full(8, np.nan, np.float32))]))
    body = np.stack(list(columns.values()), axis=1)
    kind = "double" if layout.endswith("8") else "float"
    order = {"<": "binary_little_endian", ">": "binary_big_endian", "a": "ascii"}[layout[0]]
    header = ["ply", f"format {order} 1.0", "obj_info made by hand", "element camera 2", "property uchar id"]
    header += ["element vertex 8", *(f"property {kind} {name}" for name in columns)]
    header += ["element face 1", "property list uchar int vertex_indices", "end_header", ""]
    path = tmp_path / "other.ply"
    if layout == "ascii":
        rows = ["\t".join(str(value) for value in row) for row in body.astype(np.float64)]
        path.write_bytes("\r\n".join([*header[:-1], "1", "2", rows[0], "", *rows[1:], "3 0 1 2"]).encode())
    else:
        face = b"\x03" + np.array([0, 1, 2], layout[0] + "i4").tobytes()
        path.write_bytes("\n".join(header).encode() + b"\x01\x02" + body.astype(layout).tobytes() + face)
    same(read_ply(path), gaussians, scale_error=2.0**-20)


def test_colours_that_depend_on_the_view_are_dropped_and_said_so(tmp_path: Path) -> None:
    gaussians = some_gaussians(3)
    columns = table_of(gaussians) | {f"f_rest_{i}": np.ones(3, np.float32) for i in range(45)}
    (tmp_path / "a.ply").write_bytes(binary(columns))
    with pytest.warns(PlyWarning, match=r"a\.ply: colours .*45 columns, .* up to degree 3\) are dropped"):
        back = read_ply(tmp_path / "a.ply")
    same(back, gaussians, scale_error=2.0**-20)


def test_integer_columns_and_vanishing_scales(tmp_path: Path) -> None:
    columns = {name: np.array([1, 2]) for name in NAMES} | {"scale_1": np.array([-128, -5])}
    (tmp_path / "a.ply").write_bytes(binary(columns, "<i1", names="char"))
    scales = read_ply(tmp_path / "a.ply").scales
    assert scales[:, 1].tolist() == pytest.approx([np.finfo(np.float32).tiny, math.exp(-5)])


# ---------------------------------------------------------------------- damage


def good() -> bytes:
    return binary(table_of(some_gaussians(5)))


def changed(old: str, new: str) -> bytes:
    data = good()
    assert old.encode() in data
    return data.replace(old.encode(), new.encode(), 1)


def with_value(name: str, value: float, row: int = 3) -> bytes:
    columns = {key: column.copy() for key, column in table_of(some_gaussians(5)).items()}
    columns[name][row] = value
    return binary(columns)


def without(*names: str) -> bytes:
    return binary({name: column for name, column in table_of(some_gaussians(5)).items() if name not in names})


def ascii_file(*rows: str) -> bytes:
    header = ["ply", "format ascii 1.0", "element vertex 2", *(f"property float {name}" for name in NAMES)]
    return "\n".join([*header, "end_header", *rows, ""]).encode()


ROW = "0 0 0 1 1 1 0 -4 -4 -4 1 0 0 0"
MESH = b"ply\nformat ascii 1.0\nelement vertex 1\nproperty int x\nproperty int y\nproperty int z\nend_header\n0 0 0\n"
DAMAGE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", r"is empty \(0 bytes\)"),
    "a picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(90), r"is not a \.ply file"),
    "zeros": (lambda: bytes(1000), r"is not a \.ply file"),
    "header cut off": (lambda: good()[:200], "the header does not end"),
    "endless header": (lambda: b"ply\n" + b"comment a\n" * 10**5, "the header does not end"),
    "no format": (lambda: changed("format binary_little_endian 1.0\n", ""), "does not say its format"),
    "odd format": (lambda: changed("little_endian 1.0", "middle_endian 1.0"), "header line 'format binary_middle"),
    "odd type": (lambda: changed("property float x", "property quad x"), "header line 'property quad x'"),
    "noise in the header": (lambda: changed("comment by a test", "\x00\x01"), "cannot read the header line"),
    "negative count": (lambda: changed("vertex 5", "vertex -5"), "header line 'element vertex -5'"),
    "count in words": (lambda: changed("vertex 5", "vertex five"), "header line 'element vertex five'"),
    "endless count": (lambda: changed("vertex 5", "vertex " + "9" * 5000), "cannot read the header line"),
    "huge count": (lambda: changed("vertex 5", f"vertex {10**17}"), "truncated or damaged"),
    "huge count of text": (
        lambda: ascii_file(ROW).replace(b"vertex 2", b"vertex 999999999999"),
        "truncated or damaged",
    ),
    "huge element before": (
        lambda: changed("element vertex", f"element a {10**17}\nproperty char b\nelement vertex"),
        "truncated or damaged",
    ),
    "count too large": (
        lambda: changed("vertex 5", "vertex 6"),
        "announces 408 bytes .6 vertices., .* holds 340",
    ),
    "count too small": (lambda: changed("vertex 5", "vertex 4"), "announces 272 bytes"),
    "count of zero": (lambda: binary({name: np.zeros(0) for name in NAMES}), "holds no Gaussians"),
    "truncated": (lambda: good()[:-1], "file holds 339; it is truncated or damaged"),
    "no vertices": (lambda: changed("element vertex", "element corner"), "must name one element 'vertex'"),
    "no elements": (lambda: b"ply\nformat ascii 1.0\nend_header\n", "it names nothing"),
    "property before element": (
        lambda: changed("element vertex", "property int a\nelement vertex"),
        "line 'property int",
    ),
    "property twice": (lambda: changed("property float y", "property float x"), "names the property 'x' twice"),
    "list": (lambda: changed("property float nx", "property list uchar float nx"), r"hold a list \('nx'\)"),
    "list before": (
        lambda: changed("element vertex", "element face 1\nproperty list uchar int v\nelement vertex"),
        "stands before the vertices",
    ),
    "mesh": (lambda: MESH, "mesh or points, no Gaussians: scale_0 and 10 other columns .* vertices have x, y, z"),
    "packed": (lambda: changed("property float nx", "property uint packed_position"), "packed splat file"),
    "no opacity": (lambda: without("opacity"), "the column opacity is missing"),
    "NaN": (lambda: with_value("y", math.nan), "y of Gaussian 3 is not a finite number"),
    "infinity": (lambda: with_value("scale_2", -math.inf), "scale_2 of Gaussian 3 is not a finite number"),
    "overflow": (lambda: with_value("scale_1", 100.0), "scale_1 of Gaussian 3 is too large for float32"),
    "no rotation": (
        lambda: binary(
            {n: np.zeros(2) if n.startswith("rot") else c[:2] for n, c in table_of(some_gaussians(5)).items()}
        ),
        "of Gaussian 0 has no direction: its length is zero",
    ),
    "words": (lambda: ascii_file(ROW, ROW.replace("-4 -4", "-4 four")), "row 1 must be 14 numbers, it is '0 0 .* four"),
    "short row": (lambda: ascii_file(ROW[:-2], ROW + " 0"), "row 0 must be 14 numbers"),
    "long row": (lambda: ascii_file(ROW, ROW + " 0"), "row 1 must be 14 numbers"),
    "rows missing": (lambda: ascii_file(ROW + " " * 99), "announces 2 rows, but ends after 1"),
    "rows too many": (lambda: ascii_file(ROW, ROW, ROW), "announces 2 rows, but holds more"),
    "NaN in text": (lambda: ascii_file(ROW, ROW.replace("0 0 0 1 1", "0 nan 0 1 1")), "y of Gaussian 1 is not"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_clear_line(tmp_path: Path, kind: str) -> None:
    make, message = DAMAGE[kind]
    path = tmp_path / "asset.ply"
    path.write_bytes(make())
    with pytest.raises(InputError, match=message) as caught:
        read_ply(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert len(text) < len(str(path)) + 250


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file"):
        read_ply(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        read_ply(tmp_path / "a.ply")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_flipped_bytes_never_crash_the_reader(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """What is read in spite of the damage is finite."""
    content = bytearray(good() if data.draw(st.booleans()) else ascii_file(ROW, ROW))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "flipped.ply"
    path.write_bytes(bytes(content[: data.draw(st.integers(1, len(content)))]))
    try:
        gaussians = read_ply(path)
    except InputError:
        return
    assert all(bool(getattr(gaussians, name).isfinite().all()) for name in CHANNELS)
    assert bool((gaussians.scales > 0).all())


def test_sparse_files_do_not_eat_memory(tmp_path: Path) -> None:
    """A file whose size is true and whose content is a hole of 3 GB."""
    path = tmp_path / "hole.ply"
    columns = {name: np.zeros(0) for name in NAMES}
    path.write_bytes(binary(columns, count=49_000_000))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 49_000_000 * 56)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="of Gaussian 0 has no direction"):
        read_ply(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000
    path.write_bytes(binary(columns, count=51_000_000))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 51_000_000 * 56)
    with pytest.raises(InputError, match="holds 51000000 Gaussians; at most 50000000 are read"):
        read_ply(path)


def test_files_that_could_not_be_read_are_not_written(tmp_path: Path) -> None:
    gaussians = some_gaussians(3)
    broken = gaussians.scales.clone()
    broken[1, 2] = 0.0
    with pytest.raises(InputError, match="scale_2 of Gaussian 1 is not a finite number"):
        write_ply(replace(gaussians, scales=broken), tmp_path / "a.ply")
    with pytest.raises(InputError, match="there are no Gaussians to write"):
        write_ply(gaussians.select(slice(0, 0)), tmp_path / "a.ply")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- edits


def full_covariances(gaussians: Gaussians) -> Tensor:
    full = torch.zeros(len(gaussians), 3, 3, dtype=gaussians.means.dtype)
    rows, columns = torch.triu_indices(3, 3)
    full[:, rows, columns] = gaussians.covariances
    full[:, columns, rows] = gaussians.covariances
    return full


finite = st.floats(-3, 3, allow_subnormal=False)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.tuples(finite, finite, finite, finite), st.floats(0.01, 100), st.tuples(finite, finite, finite))
def test_covariances_follow_the_transform(
    quaternion: tuple[float, ...], factor: float, offset: tuple[float, ...]
) -> None:
    turn = torch.tensor(quaternion, dtype=torch.float64) + torch.tensor([1e-3, 0, 0, 0], dtype=torch.float64)
    turn = torch.nn.functional.normalize(turn, dim=0)
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] = factor * rotation_matrices(turn)
    matrix[:3, 3] = torch.tensor(offset, dtype=torch.float64)
    torch.testing.assert_close(quaternion_of(rotation_matrices(turn)), turn * turn[0].sign())
    gaussians = some_gaussians(5, dtype=torch.float64)
    moved = transform(gaussians, matrix)
    linear = matrix[:3, :3]
    torch.testing.assert_close(moved.means, gaussians.means @ linear.T + matrix[:3, 3])
    expected = linear @ full_covariances(gaussians) @ linear.T
    torch.testing.assert_close(full_covariances(moved), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    same(transform(moved.to(dtype=torch.float32), torch.eye(4)), moved.to(dtype=torch.float32))
    back = transform(moved, torch.linalg.inv(matrix))
    torch.testing.assert_close(back.means, gaussians.means, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(full_covariances(back), full_covariances(gaussians), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.diag([1.0, 1, -1, 1]), "mirrors space"),
        (np.diag([1.0, 2, 1, 1]), r"scales unevenly \(by 2, 1, 1\)"),
        (np.eye(4) + np.eye(4, k=1) * [0, 0.5, 0, 0], "shears"),
        (np.diag([1.0, 1, 0, 1]), "flattens"),
        (np.zeros((4, 4)), "last row"),
        (np.diag([1.0, 1, 1, 2]), r"last row of a transform must be 0, 0, 0, 1"),
        (np.diag([np.nan, 1, 1, 1]), "finite"),
        (np.eye(3), r"\[4, 4\], got \[3, 3\]"),
    ],
)
def test_transforms_it_refuses(matrix: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        transform(some_gaussians(), torch.from_numpy(matrix))


@pytest.mark.parametrize("angle", [0.0, math.pi / 2, math.pi])
@pytest.mark.parametrize("axis", range(3))
def test_quarter_and_half_turns(axis: int, angle: float) -> None:
    """The cases in which formulas that divide by one component lose their digits."""
    quaternion = torch.zeros(4, dtype=torch.float64)
    quaternion[0], quaternion[1 + axis] = math.cos(angle / 2), math.sin(angle / 2)
    matrix = rotation_matrices(quaternion)
    torch.testing.assert_close(rotation_matrices(quaternion_of(matrix)), matrix, rtol=0, atol=1e-12)


def test_merge_and_part_again() -> None:
    parts = [some_gaussians(count, seed=count) for count in (3, 0, 5)]
    merged = merge(parts)
    assert merged.lengths.tolist() == [8]
    again = replace(merged, lengths=torch.tensor([3, 0, 5]))
    for one, part in zip(again, parts, strict=True):
        same(one, part)
    with pytest.raises(InputError, match=r"share dtype and device, got torch\.float32 on cpu, torch\.float64 on cpu"):
        merge([parts[0], parts[2].to(dtype=torch.float64)])
    with pytest.raises(InputError, match="no Gaussians to merge"):
        merge([])


def test_crop_keeps_what_is_inside() -> None:
    gaussians = replace(some_gaussians(60), lengths=torch.tensor([20, 0, 40]))
    low, high = (-0.2, -0.3, -1.0), (0.1, 0.3, 0.2)
    kept = crop(gaussians, low, high)
    inside = [all(a <= v <= b for a, v, b in zip(low, mean, high, strict=True)) for mean in gaussians.means.tolist()]
    same(kept, gaussians.select(torch.tensor(inside)))
    assert kept.lengths.tolist() == [sum(inside[:20]), 0, sum(inside[20:])]
    assert 0 < len(kept) < 60
    exact = gaussians.means[4].tolist()
    assert crop(gaussians, exact, exact).means.tolist() == [exact]
    with pytest.raises(InputError, match="the low one first"):
        crop(gaussians, (0, 0, 1), (1, 1, 0))
    with pytest.raises(InputError, match="two corners x, y, z"):
        crop(gaussians, (0, 0), (1, 1))


def test_gradients_pass_through_edits() -> None:
    gaussians = some_gaussians(6, dtype=torch.float64)
    means = gaussians.means.clone().requires_grad_()
    moved = transform(replace(gaussians, means=means), torch.diag(torch.tensor([2.0, 2, 2, 1])))
    crop(merge([moved, moved]), (-9, -9, -9), (9, 9, 9)).means.sum().backward()
    assert means.grad is not None
    assert bool((means.grad == 4).all())
    assert not moved.detach().means.requires_grad
