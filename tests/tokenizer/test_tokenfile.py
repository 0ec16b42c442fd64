"""Token files: exact, checked, tied to their latent space, and written whole or not at all."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tokenizer.networks import small_config
from tests.tokenizer.test_checkpoints import contents, full_disk, random_model, refused
from tokenizer import AToken, SparseTokens, TokenFile
from tokenizer.errors import InputError
from tokenizer.patches import VisualSize
from tokenizer.tokenfile import Origin, TokenReader, TokenWriter

FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SIZES = (VisualSize("image", 1, 8, 9), VisualSize("video", 9, 7, 4), VisualSize("image", 1, 4, 4))
ORIGIN = Origin("some-model", "0123456789abcdef", SIZES, (0.0, 29.97, 0.0))


def tokens(kind: torch.dtype, channels: int = 6, top: int = 4096) -> SparseTokens:
    """A picture, a clip and a picture, with random latents or indices."""
    generator = torch.Generator().manual_seed(4)
    grids = [size.grid((4, 4, 4)) for size in SIZES]
    positions = [torch.cartesian_prod(*map(torch.arange, grid), torch.arange(1)) for grid in grids]
    rows = sum(map(len, positions))
    if kind.is_floating_point:
        features = torch.randn(rows, channels, generator=generator).to(kind)
    else:
        features = torch.randint(top, (rows, channels), generator=generator, dtype=kind)
    return SparseTokens(features, torch.cat(positions), [len(part) for part in positions])


def write(path: Path, kind: torch.dtype = torch.float32, **options: int) -> TokenFile:
    stored = TokenFile(tokens(kind, **options), ORIGIN)
    stored.save(path)
    return stored


def same(one: SparseTokens, other: SparseTokens) -> bool:
    pairs = ((one.features, other.features), (one.positions, other.positions), (one.lengths, other.lengths))
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32])
@pytest.mark.parametrize("channels", [1, 3, 48])  # odd ones put later tensors at odd places
def test_everything_comes_back(tmp_path: Path, kind: torch.dtype, channels: int) -> None:
    stored = write(tmp_path / "x.atok", kind, channels=channels)
    loaded = TokenFile.load(tmp_path / "x.atok")
    assert same(loaded.tokens, stored.tokens)
    assert loaded.origin == stored.origin
    assert loaded.discrete == (not kind.is_floating_point)
    for i, item in enumerate(TokenReader(tmp_path / "x.atok").items()):
        assert same(item.tokens, stored.tokens[i])
        assert item.origin == replace(ORIGIN, sizes=(SIZES[i],), frame_rates=(ORIGIN.frame_rates[i],))
    assert sorted(contents(tmp_path)) == ["x.atok"]


def test_indices_take_two_bytes_where_they_fit(tmp_path: Path) -> None:
    assert load_file_types(write_indices(tmp_path / "a.atok", 2**15 - 1))["indices"] == torch.int16
    assert load_file_types(write_indices(tmp_path / "b.atok", 2**15))["indices"] == torch.int32


def write_indices(path: Path, largest: int) -> Path:
    """A small chunk, one with the largest index, and a small one again."""
    with TokenWriter(path) as writer:
        for value in (5, largest, 7):
            position = torch.tensor([[writer.num_tokens, 0, 0, 0]])
            writer.append(SparseTokens(torch.tensor([[value, 0]], dtype=torch.int32), position, [1]))
        size = VisualSize("video", 12, 4, 4)
        writer.finish(Origin("m", "f", (size,), (25.0,)), [3])
    assert TokenFile.load(path).tokens.features[:, 0].tolist() == [5, largest, 7]
    return path


def load_file_types(path: Path) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int32])
def test_chunks_make_the_same_file(tmp_path: Path, kind: torch.dtype) -> None:
    stored = write(tmp_path / "whole.atok", kind)
    rows = stored.tokens
    for count in (1, 2, 5, 1000):
        with TokenWriter(tmp_path / "chunks.atok") as writer:
            for start in range(0, rows.num_tokens, count):
                part = slice(start, start + count)
                features, positions = rows.features[part], rows.positions[part]
                writer.append(SparseTokens(features, positions, [len(features)]))
            writer.finish(ORIGIN, rows.lengths)
        assert (tmp_path / "chunks.atok").read_bytes() == (tmp_path / "whole.atok").read_bytes()
        pieces = list(TokenReader(tmp_path / "whole.atok").chunks(count))
        assert torch.equal(torch.cat([piece.features for piece in pieces]), rows.features)
        assert torch.equal(torch.cat([piece.positions for piece in pieces]), rows.positions)


# ---------------------------------------------------------------------- files that are broken or foreign


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "x.atok"
    write(path)
    return path.read_bytes()


@FUZZ
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_files(good: bytes, tmp_path: Path, share: float) -> None:
    path = tmp_path / "x.atok"
    path.write_bytes(good[: int(share * len(good))])
    assert refused(lambda: TokenFile.load(path)).startswith(f"{path}: not a token file, or truncated (")


@FUZZ
@given(data=st.binary(max_size=200))
def test_random_files(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.atok"
    path.write_bytes(data)
    assert refused(lambda: TokenFile.load(path)).startswith(f"{path}: not a token file, or truncated (")


@FUZZ
@given(place=st.floats(0, 1, exclude_max=True), value=st.binary(min_size=1, max_size=8))
def test_damaged_bytes_are_read_or_refused(good: bytes, tmp_path: Path, place: float, value: bytes) -> None:
    """Never another error than ours; what passes for tokens is legal tokens."""
    path = tmp_path / "x.atok"
    start = int(place * len(good))
    path.write_bytes((good[:start] + value + good[start + len(value) :])[: len(good)])
    message, loaded = "", None
    try:
        loaded = TokenFile.load(path)
    except InputError as error:
        message = str(error)
    if loaded is None:
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
    else:
        loaded.tokens.validate()
        assert len(loaded.origin.sizes) == loaded.tokens.batch_size


def metadata(**changes: Any) -> dict[str, str]:
    return {"atoken": json.dumps({**json.loads(ORIGIN.to_json()), **changes})}


def item(**changes: Any) -> dict[str, Any]:
    return {**json.loads(ORIGIN.to_json())["items"][1], **changes}


DAMAGED = "its metadata is damaged"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"atoken": "{"}, DAMAGED),
        ({"atoken": "[" * 10_000}, DAMAGED),
        ({"atoken": "[]"}, DAMAGED),
        ({"atoken": "{}"}, DAMAGED),
        (metadata(items=3), DAMAGED),
        (metadata(items=[3]), DAMAGED),
        (metadata(model=None), DAMAGED),
        (metadata(items=[item(kind="sound")] * 3), DAMAGED),
        (metadata(items=[item(frames=2.5)] * 3), DAMAGED),
        (metadata(items=[item(frames=True)] * 3), DAMAGED),
        (metadata(items=[item(height=0)] * 3), DAMAGED),
        (metadata(items=[item(frame_rate="fast")] * 3), DAMAGED),
        (metadata(items=[item(frame_rate=float("nan"))] * 3), DAMAGED),
        (metadata(items=[item(frame_rate=-1)] * 3), DAMAGED),
        (metadata(items=[]), "its tensors contradict each other"),
        (metadata(version=2), ".atok version 2, this program reads version 1"),
        (metadata(version=True), ".atok version True, this program reads version 1"),
        (metadata(version=1.0), ".atok version 1.0, this program reads version 1"),
        ({"atoken": '{"version": "9\\n"}'}, ".atok version '9\\n', this program reads version 1"),
        ({}, "a safetensors file, but not one of tokens; make one with 'atoken encode'"),
    ],
)
def test_damaged_metadata(tmp_path: Path, header: dict[str, str], message: str) -> None:
    write(tmp_path / "x.atok")
    save_file(load_file(tmp_path / "x.atok"), tmp_path / "x.atok", metadata=header)
    assert refused(lambda: TokenFile.load(tmp_path / "x.atok")).startswith(f"{tmp_path / 'x.atok'}: {message}")


def changed(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[dict[str, Tensor]], None]:
    def apply(state: dict[str, Tensor]) -> None:
        value = change(state.pop(name))
        if value is not None:
            state[name] = value

    return apply


def put(row: int, values: list[int]) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_copy(0, torch.tensor([row]), torch.tensor([values], dtype=tensor.dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("features", lambda x: x[:-1]), "odd types or shapes"),
        (changed("features", lambda x: x.flatten()), "odd types or shapes"),
        (changed("features", lambda x: x.int()), "odd types or shapes"),
        (changed("features", lambda _: None), "a safetensors file, but not one of tokens"),
        (changed("features", put(2, [0, 1, 2, 3, 4, 5])), None),
        (changed("features", lambda x: x / 0), "row 0 (item 0, position t=0 x=0 y=0 z=0) has a feature that is NaN"),
        (changed("positions", lambda x: x.float()), "odd types or shapes"),
        (changed("positions", lambda x: x[:, :3].contiguous()), "odd types or shapes"),
        (changed("positions", put(7, [1, 4096, 0, 0])), "row 7 (item 1, position t=1 x=4096 y=0 z=0) has a coordinate"),
        (changed("positions", put(7, [1, -1, 0, 0])), "row 7 (item 1, position t=1 x=-1 y=0 z=0) has a coordinate"),
        (changed("positions", put(7, [0, 0, 0, 0])), "row 7 (item 1, position t=0 x=0 y=0 z=0) has the same position"),
        (changed("lengths", lambda _: None), "a safetensors file, but not one of tokens"),
        (changed("lengths", lambda x: x.double()), "odd types or shapes"),
        (changed("lengths", lambda x: x[None]), "odd types or shapes"),
        (changed("lengths", lambda x: x[:2]), "contradict each other"),
        (changed("lengths", lambda _: torch.tensor([6, 0, 7])), "contradict each other"),
        (changed("lengths", lambda _: torch.tensor([20, -6, -1])), "contradict each other"),
        (changed("lengths", lambda _: torch.tensor([2**62, 2**62, 13])), "contradict each other"),
    ],
)
def test_tensors_that_contradict_each_other(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str | None
) -> None:
    path = tmp_path / "x.atok"
    write(path)
    state = load_file(path)
    change(state)
    save_file(state, path, metadata=metadata())
    if message is None:
        TokenFile.load(path)  # the harness itself is sound
        return
    text = refused(lambda: TokenFile.load(path))
    assert text.startswith(f"{path}: ")
    assert message in text


@pytest.mark.parametrize("name", ["missing.atok", "."])
def test_no_file(tmp_path: Path, name: str) -> None:
    assert refused(lambda: TokenFile.load(tmp_path / name)) == f"{tmp_path / name}: no such file"


# ---------------------------------------------------------------------- what is not written


def at(t: int) -> SparseTokens:
    return SparseTokens(torch.zeros(1, 6), torch.tensor([[t, 0, 0, 0]]), [1])


@pytest.mark.parametrize(
    ("chunks", "lengths", "message"),
    [
        ([at(0), tokens(torch.bfloat16)], [14], "chunks differ in type or channels"),
        ([at(0), tokens(torch.float32, 5)], [14], "chunks differ in type or channels"),
        ([at(0), SparseTokens(at(1).features / 0, at(1).positions, [1])], [2], "the model gave NaN or infinite values"),
        ([SparseTokens(torch.tensor([[3, -1]]), at(0).positions, [1])], [1], "the model gave NaN or infinite values"),
        ([at(-1)], [1], r"positions must not be negative to fit a token file"),
        ([at(0)], [2], r"lengths \[2\] do not fit 1 tokens"),
        ([at(0), at(1)], [1, 1], r"lengths \[1, 1\] do not fit 2 tokens"),
        ([], [0], r"lengths \[0\] do not fit 0 tokens"),
    ],
)
def test_bad_chunks_leave_no_file(tmp_path: Path, chunks: list[SparseTokens], lengths: list[int], message: str) -> None:
    def save() -> None:
        with TokenWriter(tmp_path / "x.atok") as writer:
            for chunk in chunks:
                writer.append(chunk)
            writer.finish(Origin("m", "f", (VisualSize("video", 4, 4, 4),), (25.0,)), lengths)

    assert re.search(message, refused(save))
    assert list(tmp_path.iterdir()) == []


def test_bad_names_and_origins(tmp_path: Path) -> None:
    assert "token files end in .atok" in refused(lambda: write(tmp_path / "x.safetensors"))
    assert "2 frame rates for 3 visuals" in refused(lambda: replace(ORIGIN, frame_rates=(0.0, 0.0)))
    for rate in (float("nan"), float("inf"), -25.0):
        assert "must be finite and not negative" in refused(lambda: replace(ORIGIN, frame_rates=(0.0, rate, 0.0)))  # noqa: B023
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_is_left_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "x.atok") as writer:
        writer.append(at(0))

    def interrupted() -> None:
        with TokenWriter(tmp_path / "x.atok") as writer:
            writer.append(at(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("room", [0, 100, 600, 20_000])  # in the parts, the header, the rows
def test_a_full_disk_leaves_the_old_file_and_no_parts(tmp_path: Path, room: int) -> None:
    write(tmp_path / "x.atok", torch.int32)
    before = contents(tmp_path)
    count = 1000
    positions = torch.zeros(count, 4, dtype=torch.int32)
    positions[:, 0] = torch.arange(count)
    long = SparseTokens(torch.zeros(count, 6), positions, [count])
    origin = Origin("m", "f", (VisualSize("video", 4 * count, 4, 4),), (25.0,))
    with full_disk(room), pytest.raises(OSError, match="File too large"):
        TokenFile(long, origin).save(tmp_path / "x.atok")
    assert contents(tmp_path) == before


# ---------------------------------------------------------------------- which model may decode it


@cache
def model(seed: int, discrete: bool = False, dtype: torch.dtype = torch.float32) -> AToken:
    network = random_model(small_config(discrete), torch.float32)
    network.reset_parameters(torch.Generator().manual_seed(seed))
    return network.to(dtype).eval()


@pytest.mark.parametrize("discrete", [False, True])
def test_a_file_is_decoded_by_its_model_alone(tmp_path: Path, discrete: bool) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8)
    own = model(1, discrete)
    encoding = own.encode_image(picture)
    encoding.save(tmp_path / "x.atok")
    stored = TokenFile.load(tmp_path / "x.atok")
    assert stored.discrete == discrete
    assert np.array_equal(own.decode_visual(stored), own.decode_visual(encoding))
    assert own.decode_visual(stored).shape == (1, 9, 14, 3)
    half = model(1, discrete, torch.bfloat16)  # the same latent space in another precision
    assert half.decode_visual(stored).shape == (1, 9, 14, 3)
    name = own.config.name
    for other in (model(2, discrete), model(1, not discrete)):
        text = refused(lambda: other.decode_visual(stored))  # noqa: B023
        assert text == (
            f"these tokens were made by '{name}' ({own.fingerprint}), whose latent space differs from that of "
            f"'{other.config.name}' ({other.fingerprint}); decode them with the model that made them"
        )


def test_many_visuals_are_decoded_one_by_one(tmp_path: Path) -> None:
    own = model(1)
    pictures = [np.random.default_rng(i).integers(0, 256, (8, 4 + 4 * i, 3), np.uint8) for i in range(2)]
    encodings = [own.encode_image(picture) for picture in pictures]
    together = SparseTokens.cat([encoding.tokens for encoding in encodings])
    origin = own.origin([encoding.size for encoding in encodings], [0.0, 0.0])
    TokenFile(together, origin).save(tmp_path / "x.atok")
    reader = TokenReader(tmp_path / "x.atok")
    for part, encoding in zip(reader.items(), encodings, strict=True):
        assert np.array_equal(own.decode_visual(part), own.decode_visual(encoding))
    assert "holds 2 visuals" in refused(lambda: own.decode_visual(TokenFile.load(tmp_path / "x.atok")))


def test_the_header_is_that_of_any_safetensors_file(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(good)
    opener: Any = safe_open
    with opener(str(tmp_path / "x"), framework="pt") as file:
        assert set(file.keys()) == {"features", "positions", "lengths"}
        assert json.loads(file.metadata()["atoken"])["fingerprint"] == ORIGIN.fingerprint
    assert struct.unpack("<Q", good[:8])[0] % 8 == 0


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("\N{CJK UNIFIED IDEOGRAPH-56FE}" * 83 + ".atok")  # 254 bytes
    write(path)
    assert TokenFile.load(path).origin == ORIGIN


def test_a_folder_that_takes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the file that was asked for and not a hidden part of it."""
    opened: list[IO[bytes]] = []

    def only_once(path: Path, mode: str) -> IO[bytes]:
        if opened:
            raise PermissionError(13, "Permission denied", str(path))
        opened.append(open(path, mode))  # noqa: PTH123, SIM115 - Path.open is what is replaced
        return opened[0]

    monkeypatch.setattr(Path, "open", only_once)
    with pytest.raises(PermissionError) as error:
        write(tmp_path / "x.atok")
    assert error.value.filename == str(tmp_path / "x.atok")
    assert list(tmp_path.iterdir()) == []
    assert opened[0].closed


def test_an_interrupt_while_parts_are_opened_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, whole = [], Path.open

    def interrupted(path: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(whole(path, *arguments, **options))
        if len(opened) == 2:
            raise KeyboardInterrupt
        return opened[-1]

    monkeypatch.setattr(Path, "open", interrupted)
    with pytest.raises(KeyboardInterrupt), TokenWriter(tmp_path / "clip.atok"):
        pass
    assert len(opened) == 2
    assert not list(tmp_path.iterdir())
