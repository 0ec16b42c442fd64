"""Writing videos block by block, in the format that the ending of the path names.

| path         | what is written                                                                                  |
|--------------|--------------------------------------------------------------------------------------------------|
| `x.mp4`      | H.264 with 4:2:0 colour, the one every player opens. It holds even sizes only: an odd width or   |
|              | height gets its last column or row once more.                                                    |
| `x.webm`     | VP9 with 4:2:0 colour, exact size                                                                |
| `x.gif`      | 256 colours chosen for each frame, exact size, times rounded to hundredths of a second           |
| `x` or `x/`  | a folder of `frame_000000.png`, `frame_000001.png`, ...; lossless                                |
| `x.npy`      | one uint8 array [T, H, W, 3]; lossless                                                           |

MP4 and WebM say how their colours are to be read: the matrix is BT.709 from 720 rows up and BT.601 below, for which
players take a file without tags, so that those that ignore tags are right too; primaries and transfer are BT.709, the
range is the limited one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenizer.atomic import atomic_path
from tokenizer.errors import InputError, require_package
from tokenizer.media.images import check_sides, save_image

if TYPE_CHECKING:
    import av

SAVED_VIDEO_ENDINGS: Final = (".mp4", ".webm", ".gif", ".npy")

LARGEST_SIDES: Final = {".mp4": 16384, ".webm": 65536, ".gif": 65535}
"""Pixels a side that the encoders take."""

FASTEST_GIF: Final = 100
"""Frames a second. More would be shown at the same time, which no player and not even the encoder accepts."""

HD_ROWS: Final = 720
"""Rows of a frame from which on players take a video without tags for BT.709, and for BT.601 below."""

Frame = NDArray[np.uint8]
_WriteFrame = Callable[[Frame], None]

_FRAME_FILE = re.compile(r"frame_\d{6,}\.png")

# Quality just short of visible loss, at speeds that do not dominate the tokenizer's. GIF has none to choose.
_CODECS: Final[dict[str, tuple[str, str, dict[str, str]]]] = {
    ".mp4": ("libx264", "yuv420p", {"crf": "16", "preset": "medium"}),
    ".webm": ("libvpx-vp9", "yuv420p", {"crf": "20", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"}),
    ".gif": ("gif", "pal8", {}),
}


class VideoWriter:
    """Write a video whole or not at all, block by block, in memory that does not grow with the length.

    Use as a context manager: the file appears when the `with` block ends without an error, and replaces an older one.
    A folder is replaced only if it holds nothing but frames of an earlier run.

    Args:
        path: .mp4, .webm, .gif, .npy, or no ending for a folder of PNG frames.
        fps: frames per second; .npy and PNG do not store it.
        height, width: of every frame, in pixels.

    Raises:
        InputError: unknown ending, a folder that holds other things, more pixels a side or frames a second than the
            format holds, a frame of another size, or no frame at all.
        OSError: the file cannot be written (no room, no permission).
    """

    def __init__(self, path: str | os.PathLike[str], fps: Fraction | float, height: int, width: int) -> None:
        self.path = Path(path)
        check_video_ending(self.path)
        check_sides(self.path, height, width, LARGEST_SIDES, ".npy, or a name with no ending for PNG frames")
        self.fps = Fraction(fps).limit_denominator(100_000)
        if self.fps <= 0:
            raise InputError(f"{self.path}: a frame rate of {fps}; it must be above 0")
        if self.path.suffix.lower() == ".gif" and self.fps > FASTEST_GIF:
            raise InputError(
                f"{self.path}: {float(self.fps):g} frames a second; .gif counts in hundredths of a second and holds at "
                f"most {FASTEST_GIF}: write .mp4 or .webm"
            )
        self.height, self.width = height, width
        self.num_frames = 0
        self._resources = ExitStack()
        self._write_frame: _WriteFrame | None = None

    def __enter__(self) -> VideoWriter:
        with ExitStack() as resources:
            temporary = resources.enter_context(atomic_path(self.path))
            self._write_frame = resources.enter_context(self._open(temporary))
            resources.push(self._refuse_empty)
            self._resources = resources.pop_all()
        return self

    def write(self, block: NDArray[np.uint8]) -> None:
        """Append frames: uint8 [T, H, W, 3], RGB."""
        assert self._write_frame is not None, "VideoWriter.write belongs inside the with block"
        if block.dtype != np.uint8 or block.ndim != 4 or block.shape[1:] != (self.height, self.width, 3):
            raise InputError(
                f"{self.path}: frames to write are uint8 [T, {self.height}, {self.width}, 3], "
                f"these are {block.dtype} {list(block.shape)}"
            )
        for frame in block:
            self._write_frame(frame)
            self.num_frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._write_frame = None
        self._resources.__exit__(kind, error, traceback)

    def _refuse_empty(
        self, kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if kind is None and self.num_frames == 0:
            raise InputError(f"{self.path}: no frames to write")

    def _open(self, temporary: Path) -> AbstractContextManager[_WriteFrame]:
        ending = self.path.suffix.lower()
        if ending == "":
            return _frame_folder(temporary)
        if ending == ".npy":
            return _array_file(temporary, self.height, self.width)
        if ending == ".gif":
            return _container(temporary, ending, self.fps, (self.height, self.width), _palette_frame)
        even = ending == ".mp4"
        size = (self.height + self.height % 2, self.width + self.width % 2) if even else (self.height, self.width)
        return _container(temporary, ending, self.fps, size, _yuv_frame)


def check_video_ending(path: Path) -> None:
    """Raise `InputError` unless a video can be written to `path`."""
    if path.suffix.lower() not in ("", *SAVED_VIDEO_ENDINGS):
        raise InputError(
            f"{path}: ending '{path.suffix}'; videos are written as {', '.join(SAVED_VIDEO_ENDINGS)}, "
            "or with no ending as a folder of PNG frames"
        )
    if path.suffix and path.is_dir():
        raise InputError(f"{path}: is a folder; name a file")
    if not path.suffix and path.exists():
        if not path.is_dir():
            raise InputError(f"{path}: is a file; name a folder for the frames, or give it an ending")
        strangers = sorted(entry.name for entry in path.iterdir() if not _FRAME_FILE.fullmatch(entry.name))
        if strangers:
            raise InputError(f"{path}: holds '{strangers[0]}' beside frames; name a new folder")


@contextmanager
def _frame_folder(folder: Path) -> Iterator[_WriteFrame]:
    folder.mkdir()
    count = 0

    def write(frame: Frame) -> None:
        nonlocal count
        save_image(frame, folder / f"frame_{count:06d}.png")
        count += 1

    yield write


@contextmanager
def _array_file(path: Path, height: int, width: int) -> Iterator[_WriteFrame]:
    count = 0
    with path.open("wb") as file:

        def write_header() -> None:
            # numpy pads the header so that the first axis can grow without moving the data behind it.
            file.seek(0)
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, 3)}
            np.lib.format.write_array_header_1_0(file, header)

        def write(frame: Frame) -> None:
            nonlocal count
            file.write(frame.tobytes())
            count += 1

        write_header()
        yield write
        write_header()


@contextmanager
def _container(
    path: Path,
    ending: str,
    fps: Fraction,
    size: tuple[int, int],
    make_frame: Callable[[Frame, tuple[int, int]], av.VideoFrame],
) -> Iterator[_WriteFrame]:
    require_package("av", "reading and writing videos")
    import av

    codec, pixel_format, options = _CODECS[ending]
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError as error:
        raise InputError(f"{path}: this build of PyAV has no encoder {codec}; write .npy or PNG frames") from error
    muxer_options = {"movflags": "+faststart"} if ending == ".mp4" else {}
    with av.open(str(path), "w", format=ending[1:], options=muxer_options) as container:
        stream: Any = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = size
        stream.pix_fmt = pixel_format
        if pixel_format == "yuv420p":
            _tag_colours(stream.codec_context, size[0])
        count = 0

        def write(frame: Frame) -> None:
            nonlocal count
            picture = make_frame(frame, size)
            picture.pts = count
            picture.time_base = 1 / fps
            container.mux(stream.encode(picture))
            count += 1

        yield write
        container.mux(stream.encode(None))


def _tag_colours(encoder: Any, rows: int) -> None:
    """State the colours as numbers of ISO/IEC 23091-2, for frames of `_yuv_frame`."""
    encoder.colorspace = 1 if rows >= HD_ROWS else 6  # the matrix: BT.709 or BT.601
    encoder.color_primaries = encoder.color_trc = 1  # BT.709; its primaries are those of sRGB
    encoder.color_range = 1  # limited, 16..235


def _yuv_frame(frame: Frame, size: tuple[int, int]) -> av.VideoFrame:
    """4:2:0 in the matrix that `_tag_colours` states; FFmpeg's own choice would be BT.601 at every size."""
    import av
    from av.video.reformatter import ColorRange, Colorspace

    padding = [(0, size[0] - frame.shape[0]), (0, size[1] - frame.shape[1]), (0, 0)]
    rgb = av.VideoFrame.from_ndarray(np.pad(frame, padding, mode="edge"), format="rgb24")
    matrix = Colorspace.ITU709 if size[0] >= HD_ROWS else Colorspace.ITU601
    return rgb.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=ColorRange.MPEG)


def _palette_frame(frame: Frame, _size: tuple[int, int]) -> av.VideoFrame:
    import av

    picture = Image.fromarray(frame).quantize(256, dither=Image.Dither.FLOYDSTEINBERG)
    colours = np.zeros((256, 4), np.uint8)
    palette = np.array(picture.getpalette("RGB"), np.uint8).reshape(-1, 3)
    colours[:, 0] = 255  # opaque; PyAV takes alpha, red, green, blue
    colours[: len(palette), 1:] = palette
    indexed: Any = (np.asarray(picture), colours)  # what PyAV documents for pal8; its stubs do not know it
    return av.VideoFrame.from_ndarray(indexed, format="pal8")
