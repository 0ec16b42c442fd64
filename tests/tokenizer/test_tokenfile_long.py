"""Token files of videos longer than a batch, and than 16 bits, can count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tokenizer.networks import small_config
from tests.tokenizer.test_checkpoints import contents, random_model, refused
from tokenizer import AToken, SparseTokens, TokenFile
from tokenizer.patches import VisualSize
from tokenizer.sparse import MAX_POSITION
from tokenizer.streaming import decode_stream, encode_stream
from tokenizer.tokenfile import Origin, TokenReader, TokenWriter


def steps(count: int, first: int = 0) -> SparseTokens:
    """One token in each of `count` latent steps, the first at `first`."""
    positions = torch.zeros(count, 4, dtype=torch.int32)
    positions[:, 0] = torch.arange(first, first + count)
    return SparseTokens(torch.arange(count)[:, None].float(), positions, [count])


def origin(*frames: int) -> Origin:
    return Origin("m", "f", tuple(VisualSize("video", count, 4, 4) for count in frames), (25.0,) * len(frames))


@pytest.mark.parametrize(("last", "kind"), [(2**15 - 1, torch.int16), (2**15, torch.int32), (2**31 - 1, torch.int32)])
def test_positions_take_four_bytes_only_where_they_must(tmp_path: Path, last: int, kind: torch.dtype) -> None:
    """Whichever chunk has the largest. Files that 16 bits can hold are those of ever."""
    chunks = [steps(3), steps(2, last - 1), steps(3)]
    with TokenWriter(tmp_path / "x.atok") as writer:
        for chunk in chunks:
            writer.append(chunk)
        writer.finish(origin(2**31), [8])
    assert load_file(tmp_path / "x.atok")["positions"].dtype == kind
    pieces = list(TokenReader(tmp_path / "x.atok").chunks(3))
    positions = torch.cat([piece.positions for piece in pieces])
    assert positions.dtype == torch.int32
    assert torch.equal(positions, torch.cat([chunk.positions for chunk in chunks]))
    assert sorted(contents(tmp_path)) == ["x.atok"]


def test_a_video_of_more_steps_than_16_bits_is_encoded_and_decoded(tmp_path: Path) -> None:
    """Its last tile, past step 32768, equals the same frames as a video of their own."""
    config = replace(small_config(), tile_frames=4096)  # long tiles, for speed alone
    model = AToken(config)
    model.load_state_dict(random_model(small_config(), torch.float32).state_dict())
    model.eval()
    tail = torch.rand(4096, 4, 4, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    frames = [*[torch.zeros(4096, 4, 4, 3)] * 32, tail]
    size = VisualSize("video", 33 * 4096, 4, 4)
    with TokenWriter(tmp_path / "x.atok") as writer:
        for tile in encode_stream(model, frames):
            writer.append(tile.encoding.latents)
        writer.finish(model.origin([size], [25.0]), [writer.num_tokens])
    reader = TokenReader(tmp_path / "x.atok")
    assert reader.num_tokens == 33 * 1024 > 2**15
    *_, last = decode_stream(model, reader.chunks(700), size)
    alone = [tile.encoding.latents for tile in encode_stream(model, [tail])]
    expected = torch.cat(list(decode_stream(model, alone, replace(size, frames=4096))))
    torch.testing.assert_close(last, expected, rtol=0, atol=1e-5)


def test_loading_more_steps_than_a_batch_counts_names_the_way_to_read_them(tmp_path: Path) -> None:
    path, most = tmp_path / "x.atok", MAX_POSITION + 1
    TokenFile(steps(most), origin(4 * most)).save(path)
    assert TokenFile.load(path).tokens.num_tokens == most
    TokenFile(steps(most + 1), origin(4 * most + 1)).save(path)
    assert refused(lambda: TokenFile.load(path)) == (
        f"{path}: its video has 4097 latent steps, and a batch holds at most 4096; "
        "decode it with 'atoken decode', or with decode_stream from TokenReader.chunks"
    )
    assert sum(chunk.num_tokens for chunk in TokenReader(path).chunks(1000)) == most + 1
    # Among others it is named as well; a step beyond all frames is damage.
    both = SparseTokens.cat([steps(2), steps(most + 1)])
    TokenFile(both, origin(8, 4 * most + 1)).save(path)
    assert "its video has 4097 latent steps" in refused(lambda: list(TokenReader(path).items()))
    TokenFile(steps(2, most), origin(8)).save(path)
    assert refused(lambda: TokenFile.load(path)).endswith("coordinate outside 0..4095; encode the visual again")
