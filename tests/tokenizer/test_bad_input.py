"""What people and disks get wrong, through the command line: one clear line, a non-zero exit, no partial output."""

from __future__ import annotations

import resource
import struct
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from tokenizer import AToken
from tokenizer.cli import main
from tokenizer.media import VideoReader, VideoWriter, save_image

Pixels = NDArray[np.uint8]
Atoken = Callable[..., tuple[int, str, str]]
MakeFile = Callable[[Path, Pixels], object]


@pytest.fixture
def atoken(
    bundled: Path,  # noqa: ARG001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Atoken:
    """Runs a command in this process, in an empty folder: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        return int(stop.value.code or 0), *capsys.readouterr()

    return run


def write_video(path: Path, clip: Pixels) -> Path:
    with VideoWriter(path, 25, *clip.shape[1:3]) as writer:
        writer.write(clip)
    return path


def cut(path: Path, share: float) -> None:
    """Keep the first `share` of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def write_cut_image(path: Path, clip: Pixels) -> None:
    save_image(clip[0], path)
    cut(path, 0.6)


def write_cut_video(path: Path, clip: Pixels) -> None:
    write_video(path, np.concatenate([clip] * 4))
    cut(path, 0.6)


def write_huge_png(path: Path, _clip: Pixels) -> None:
    """20000 x 10000 pixels by its header; all zeros, so that 600 MB lie in 0.6 MB."""
    compressor = zlib.compressobj(9)
    rows = b"".join(compressor.compress(bytes(20000 * 3 + 1)) for _ in range(10000)) + compressor.flush()

    def chunk(tag: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    header = struct.pack(">IIBBBBB", 20000, 10000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def write_sound(path: Path, _clip: Pixels) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux([*stream.encode(frame), *stream.encode(None)])


def write_video_without_frames(path: Path, _clip: Pixels) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()


BROKEN: dict[str, tuple[MakeFile, str]] = {
    "zero.png": (lambda path, _: path.touch(), "is empty (0 bytes)"),
    "zero.mp4": (lambda path, _: path.touch(), "is empty (0 bytes)"),
    "missing.png": (lambda *_: None, "no such file"),
    "cut.png": (write_cut_image, "is truncated or damaged"),
    "cut.jpg": (write_cut_image, "is truncated or damaged"),
    "cut.webp": (write_cut_image, "is not a picture that can be read, or its header is damaged"),
    "cut.gif": (write_cut_video, "is truncated or damaged"),
    "cut.mp4": (write_cut_video, "is truncated: it declares 40 frames"),
    "cut.webm": (write_cut_video, "is truncated: it declares 1.6 s"),
    "text.png": (lambda path, _: path.write_text("no picture"), "is not a picture that can be read"),
    "text.mp4": (lambda path, _: path.write_text("no video"), "is not a video that can be read"),
    "text": (lambda path, _: path.write_text("neither"), "is not a video that can be read"),
    "huge.png": (write_huge_png, "20000x10000 is 200 megapixels; pictures must stay below 200: resize it first"),
    "sound.mp4": (write_sound, "has no video stream"),
    "empty.avi": (write_video_without_frames, "is a video with no frames"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("command", [("encode", "out.atok"), ("reconstruct", "out")])
def test_broken_files(atoken: Atoken, clip: Pixels, tmp_path: Path, name: str, command: tuple[str, str]) -> None:
    make, message = BROKEN[name]
    make(tmp_path / name, clip)
    before = sorted(tmp_path.rglob("*"))
    start = time.monotonic()
    status, out, err = atoken(command[0], name, "--out", command[1])
    assert (status, out) == (1, "")
    assert err.startswith(f"error: {name}: ")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert time.monotonic() - start < 5  # a huge picture is refused by its header


@pytest.mark.parametrize("ending", ["mp4", "webm", "gif"])
def test_one_frame_and_odd_sizes_survive(atoken: Atoken, clip: Pixels, tmp_path: Path, ending: str) -> None:
    for frames in (3,) if ending == "gif" else (1, 3):  # a GIF with one frame is a picture
        write_video(tmp_path / f"odd.{ending}", clip[:frames])
        height, width = (46, 62) if ending == "mp4" else (45, 61)
        assert atoken("encode", f"odd.{ending}", "--out", "odd.atok")[0] == 0
        assert atoken("decode", "odd.atok", "--out", "odd.npy")[0] == 0
        assert np.load("odd.npy").shape == (frames, height, width, 3)


def test_variable_frame_rate_keeps_every_frame(
    atoken: Atoken, clip: Pixels, tmp_path: Path, needs_program: Callable[[str], None]
) -> None:
    needs_program("ffmpeg")
    write_video(tmp_path / "clip.mp4", clip)
    command = ["ffmpeg", "-v", "error", "-i", "clip.mp4", "-vf", "select='not(between(n,3,6))'", "-fps_mode", "vfr"]
    subprocess.run([*command, "vfr.mp4"], check=True, cwd=tmp_path)
    assert atoken("encode", "vfr.mp4", "--out", "vfr.atok")[0] == 0
    assert atoken("decode", "vfr.atok", "--out", "even.mp4")[0] == 0
    reader = VideoReader("even.mp4")
    assert (reader.num_frames, reader.variable_frame_rate) == (6, False)
    assert reader.fps == pytest.approx(Fraction(125, 9), rel=1e-3)  # 6 frames over 9 steps of 1/25 s


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Writing fails after `room` bytes of a file, as on a full disk. Needs no rights."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("out", ["x.png", "x.jpg", "x.webp", "x.mp4", "x.webm", "x.gif", "x.npy", "x", "x.atok"])
@pytest.mark.parametrize("room", [100, 2000])
def test_full_disk(atoken: Atoken, clip: Pixels, tmp_path: Path, out: str, room: int) -> None:
    video = out not in ("x.png", "x.jpg", "x.webp")
    noise = np.random.default_rng(0).integers(0, 256, (20, 45, 61, 3), np.uint8)
    source = tmp_path / ("in.npy.mp4" if video else "in.png")
    if video:
        write_video(source, noise)
    else:
        save_image(clip[0], source)
    assert atoken("encode", source, "--out", "in.atok")[0] == 0
    before = sorted(tmp_path.rglob("*"))
    with full_disk(room):
        command = ("encode", source) if out == "x.atok" else ("decode", "in.atok")
        status, printed, err = atoken(*command, "--out", out)
    assert (status, printed) == (1, "")
    assert err == f"error: {out}: File too large\n"
    assert sorted(tmp_path.rglob("*")) == before


def truncated_tokens(path: Path, picture: Pixels) -> None:
    AToken.from_pretrained("atoken-nano").encode_image(picture).save(path)
    cut(path, 0.7)


def wrong_sizes(path: Path, picture: Pixels) -> None:
    stored = AToken.from_pretrained("atoken-nano").encode_image(picture)
    tensors = {"features": stored.tokens.features[:-1].contiguous(), "positions": stored.tokens.positions[:-1].short()}
    save_file({**tensors, "lengths": torch.tensor([11])}, path, metadata={"atoken": stored.origin.to_json()})


def changed_tokens(change: Callable[[dict[str, torch.Tensor]], object]) -> MakeFile:
    def make(path: Path, picture: Pixels) -> None:
        stored = AToken.from_pretrained("atoken-nano").encode_image(picture)
        tokens = stored.tokens
        tensors = {"features": tokens.features.contiguous(), "positions": tokens.positions.short()}
        tensors["lengths"] = tokens.lengths
        change(tensors)
        save_file(tensors, path, metadata={"atoken": stored.origin.to_json()})

    return make


def unsorted_video(path: Path, picture: Pixels) -> None:
    """Tokens of a stream come in order of time; these do not."""
    stored = AToken.from_pretrained("atoken-nano").encode_video(np.stack([picture] * 20))
    tokens = stored.tokens
    tensors = {"features": tokens.features.flip(0).contiguous(), "positions": tokens.positions.flip(0).short()}
    save_file({**tensors, "lengths": tokens.lengths}, path, metadata={"atoken": stored.origin.to_json()})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (truncated_tokens, "not a token file, or truncated"),
        (lambda path, _: path.write_text("text"), "not a token file, or truncated"),
        (lambda path, _: path.touch(), "not a token file, or truncated"),
        (lambda path, _: save_file({"a": torch.zeros(1)}, path), "a safetensors file, but not one of tokens"),
        (wrong_sizes, "grid"),
        (changed_tokens(lambda t: t["features"][5].fill_(torch.nan)), "row 5 (item 0, position t=0 x=1 y=1 z=0) has a"),
        (changed_tokens(lambda t: t["positions"][5].fill_(4096)), "has a coordinate outside 0..4095"),
        (changed_tokens(lambda t: t["positions"][5].fill_(-1)), "has a coordinate outside 0..4095"),
        (changed_tokens(lambda t: t["positions"][5].zero_()), "row 5 (item 0, position t=0 x=0 y=0 z=0) has the same"),
        (changed_tokens(lambda t: t.update(lengths=t["lengths"][:0])), "its tensors contradict each other"),
    ],
)
def test_broken_token_files(atoken: Atoken, picture: Pixels, tmp_path: Path, make: MakeFile, message: str) -> None:
    make(tmp_path / "x.atok", picture)
    status, out, err = atoken("decode", "x.atok", "--out", "x.png")
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.atok"]


def test_tokens_of_a_video_out_of_order(atoken: Atoken, picture: Pixels, tmp_path: Path) -> None:
    unsorted_video(tmp_path / "x.atok", picture)
    status, out, err = atoken("decode", "x.atok", "--out", "x.mp4")
    assert (status, out) == (1, "")
    assert err.startswith("error: x.atok: ")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.atok"]


def other_architecture(folder: Path, models: Path) -> None:
    text = (models / "atoken-nano" / "config.json").read_text().replace('"width": 32', '"width": 64')
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").write_bytes((models / "atoken-nano" / "model.safetensors").read_bytes())


def foreign_weights(folder: Path, models: Path) -> None:
    (folder / "config.json").write_bytes((models / "atoken-nano" / "config.json").read_bytes())
    save_file({f"layer.{i}": torch.zeros(2) for i in range(50)}, folder / "model.safetensors")


def truncated_weights(folder: Path, models: Path) -> None:
    other_architecture(folder, models)
    cut(folder / "model.safetensors", 0.5)


def unknown_setting(folder: Path, models: Path) -> None:
    other_architecture(folder, models)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"latent_channels"', '"latent_chanels"'))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_architecture, "of another shape (decoder."),
        (foreign_weights, "50 unexpected (layer.0, layer.1, layer.10, ...)"),
        (truncated_weights, "not a readable safetensors file"),
        (unknown_setting, "unknown key 'latent_chanels'; did you mean 'latent_channels'?"),
    ],
)
def test_checkpoints_of_something_else(
    atoken: Atoken, bundled: Path, picture: Pixels, tmp_path: Path, make: MakeFile, message: str
) -> None:
    save_image(picture, tmp_path / "a.png")
    (tmp_path / "model").mkdir()
    make(tmp_path / "model", bundled)  # type: ignore[arg-type]
    status, out, err = atoken("encode", "a.png", "--out", "a.atok", "--model", "model")
    assert (status, out) == (1, "")
    assert err.startswith("error: model/")
    assert message in err
    assert err.count("\n") == 1
    assert len(err) < 500  # bad keys are listed, not dumped
    assert not (tmp_path / "a.atok").exists()
