"""Assets through `AToken` and through the command `atoken`: meshes and views in, token files, Gaussians out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import TINY_GAUSSIANS
from tests.tokenizer.test_cli import Atoken, atoken  # noqa: F401  (a fixture)
from tokenizer import AToken, TokenFile
from tokenizer.assets.load import load_mesh
from tokenizer.assets.pipeline import VIEWS, asset_views
from tokenizer.errors import InputError
from tokenizer.gaussians import GaussianDecoder, GaussianDecoderConfig
from tokenizer.gaussians.checkpoints import load_gaussian_decoder, save_gaussian_decoder
from tokenizer.gaussians.edit import transform
from tokenizer.gaussians.ply import read_ply
from tokenizer.gaussians.released import config_to_released, to_released
from tokenizer.media import VideoReader, load_image
from tokenizer.sparse import SparseTokens
from tokenizer.tensorio import write_safetensors
from tokenizer.voxels import AssetSize

BOX = """\
mtllib box.mtl
v 10 0 0
v 12 0 0
v 12 4 0
v 10 4 0
v 10 0 -1
v 12 0 -1
v 12 4 -1
v 10 4 -1
usemtl orange
f 1 2 3 4
f 8 7 6 5
f 5 6 2 1
f 6 7 3 2
f 7 8 4 3
f 8 5 1 4
"""
"""A box of 2 x 4 x 1, y up, away from the origin."""


@pytest.fixture
def box(tmp_path: Path) -> Path:
    (tmp_path / "box.mtl").write_text("newmtl orange\nKd 0.9 0.5 0.1\n")
    (tmp_path / "box.obj").write_text(BOX)
    return tmp_path / "box.obj"


@pytest.fixture(scope="module")
def model(tiny_models: Path) -> AToken:
    return AToken.from_pretrained(tiny_models / "atoken-nano", dtype=torch.float32)


# ---------------------------------------------------------------------- Python


def test_a_mesh_its_views_and_a_folder_of_them_are_the_same_asset(model: AToken, box: Path, tmp_path: Path) -> None:
    seen = []
    encoding = model.encode_asset(box, on_view=lambda: seen.append(1))
    assert len(seen) == VIEWS
    assert bool((encoding.tokens.positions[:, 0] == 1).all())
    assert int(encoding.tokens.positions[:, 1:].max()) < TINY_GAUSSIANS.resolution
    views, _ = asset_views(load_mesh(box))
    views.save(tmp_path / "views")
    for other in (load_mesh(box), views, tmp_path / "views", tmp_path / "views" / "transforms.json"):
        # Matrices inverted twice move pixels by less than float32 can hold; hardly any changes its voxel.
        same = model.encode_asset(other)
        assert abs(same.tokens.num_tokens - encoding.tokens.num_tokens) <= 2
    assert torch.equal(model.encode_asset(views).tokens.features, encoding.tokens.features)


def test_tokens_of_an_asset_keep_the_way_back(model: AToken, box: Path, tmp_path: Path) -> None:
    encoding = model.encode_asset(box)
    encoding.save(tmp_path / "box.atok")
    stored = TokenFile.load(tmp_path / "box.atok")
    (size,) = stored.origin.sizes
    assert isinstance(size, AssetSize)
    assert size == encoding.size
    cube = model.decode_asset(stored)
    assert len(cube) == stored.tokens.num_tokens * TINY_GAUSSIANS.gaussians
    assert float(cube.means.abs().max()) < 0.6
    placed = model.decode_asset(stored, original=True)
    torch.testing.assert_close(placed.means, transform(cube, torch.tensor(size.to_original)).means)
    # Surface voxels of the unit cube lie along the box again, in its own axes: 10..12, 0..4, -1..0.
    low, high = placed.means.amin(dim=0), placed.means.amax(dim=0)
    voxel = 4 / TINY_GAUSSIANS.resolution
    torch.testing.assert_close(low, torch.tensor([10.0, 0.0, -1.0]), atol=1.5 * voxel, rtol=0)
    torch.testing.assert_close(high, torch.tensor([12.0, 4.0, 0.0]), atol=1.5 * voxel, rtol=0)


def test_an_asset_that_cannot_be_seen_is_told_why(model: AToken, tmp_path: Path) -> None:
    """Some programs write d 0, or alpha 0, for everything; there is nothing to normalise then."""
    (tmp_path / "glass.mtl").write_text("newmtl glass\nd 0\n")
    (tmp_path / "glass.obj").write_text("mtllib glass.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nusemtl glass\nf 1 2 3\n")
    with pytest.raises(InputError, match="all of it is transparent"):
        model.encode_asset(tmp_path / "glass.obj")


def test_voxels_outside_their_grid_are_refused(model: AToken, box: Path) -> None:
    """A damaged file, or tokens that another program wrote: they would be Gaussians somewhere beside the asset."""
    encoding = model.encode_asset(box)
    for axis in (1, 2, 3):
        positions = encoding.tokens.positions.clone()
        positions[-1, axis] = TINY_GAUSSIANS.resolution
        tokens = SparseTokens(encoding.tokens.features, positions, encoding.tokens.lengths)
        with pytest.raises(InputError, match=rf"row {len(positions) - 1} .*outside its grid"):
            model.decode_asset(TokenFile(tokens, encoding.origin))


def test_what_does_not_fit_together_is_refused(model: AToken, box: Path, tiny_models: Path) -> None:
    encoding = model.encode_asset(box)
    with pytest.raises(InputError, match="decode_asset"):
        model.decode_visual(encoding)
    picture = model.encode_image(np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(InputError, match="decode_visual"):
        model.decode_asset(picture)
    other = AToken.from_pretrained(tiny_models / "atoken-nano-d", dtype=torch.float32)
    with pytest.raises(InputError, match="latent space"):
        other.decode_asset(encoding)
    bare = AToken.from_pretrained(tiny_models / "atoken-nano", dtype=torch.float32)
    object.__setattr__(bare, "gaussian_decoder", None)
    assert int(bare.encode_asset(box).tokens.positions.max()) > TINY_GAUSSIANS.resolution  # 64, as released
    with pytest.raises(InputError, match="no Gaussian decoder"):
        bare.decode_asset(encoding)
    with pytest.raises(InputError, match="takes voxels of 10 channels"):
        bare.use_gaussian_decoder(GaussianDecoder(GaussianDecoderConfig(width=12, depth=0, heads=1, inputs=10)))
    bare.use_gaussian_decoder(GaussianDecoder(GaussianDecoderConfig(width=12, depth=0, heads=1)))
    with pytest.raises(InputError, match="grid of 12"):
        bare.decode_asset(encoding)


def test_the_decoder_is_saved_with_its_model_and_stays_out_of_the_latent_space(model: AToken, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    again = AToken.from_pretrained(tmp_path / "model")
    assert again.fingerprint == model.fingerprint
    assert not any("gaussian" in name for name in model.state_dict())
    mine, theirs = model.gaussian_decoder, again.gaussian_decoder
    assert mine is not None
    assert theirs is not None
    assert theirs.config == mine.config
    for name, tensor in mine.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name


def test_files_of_decoders(tmp_path: Path) -> None:
    config = GaussianDecoderConfig(width=12, depth=1, heads=2, mlp_width=16, gaussians=4)
    decoder = GaussianDecoder(config)
    decoder.reset_parameters(torch.Generator().manual_seed(0))
    released = tmp_path / "3d_decode_gs.safetensors"
    state = to_released(decoder) | {"lpips_loss.net.weight": torch.zeros(3)}
    write_safetensors({name: tensor.clone() for name, tensor in state.items()}, released, {})
    with pytest.raises(InputError, match="3d_decode_gs"):
        load_gaussian_decoder(released)  # the published sizes do not fit
    released.with_suffix(".json").write_text(json.dumps(config_to_released(config)))
    loaded = load_gaussian_decoder(released, dtype=torch.bfloat16)
    assert loaded.embed.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.offset_perturbation, decoder.offset_perturbation)

    save_gaussian_decoder(decoder, tmp_path / "own", torch.float16)
    own = load_gaussian_decoder(tmp_path / "own")
    assert own.embed.weight.dtype == torch.float16
    (tmp_path / "own" / "config.json").write_text((tmp_path / "own" / "config.json").read_text().replace("12", "18"))
    with pytest.raises(InputError, match="another shape"):
        load_gaussian_decoder(tmp_path / "own")
    with pytest.raises(InputError, match="no such file or folder"):
        load_gaussian_decoder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no Gaussian decoder"):
        load_gaussian_decoder(tmp_path / "empty")


# ---------------------------------------------------------------------- command line


def test_encode_and_decode(atoken: Atoken, box: Path) -> None:  # noqa: F811
    encoded = atoken("encode", box, "--out", "box.atok", "--json")
    assert encoded.status == 0, encoded.err
    (result,) = encoded.json["results"]
    assert result["kind"] == "asset"
    decoded = atoken("decode", "box.atok", "--out", "box.ply", "--original", "--json")
    assert decoded.status == 0, decoded.err
    gaussians = read_ply("box.ply")
    assert len(gaussians) == result["tokens"] * TINY_GAUSSIANS.gaussians == decoded.json["results"][0]["gaussians"]
    assert float(gaussians.means[:, 0].min()) > 9
    refused = atoken("decode", "box.atok", "--out", "box.png")
    assert refused.status == 1
    assert "decoded to .ply" in refused.err
    assert not Path("box.png").exists()


def test_reconstruct_shows_the_original_beside(atoken: Atoken, box: Path) -> None:  # noqa: F811
    outcome = atoken("reconstruct", box, "--out", "copy.ply", "--discrete", "--json")
    assert outcome.status == 0, outcome.err
    (result,) = outcome.json["results"]
    assert result["files"] == ["copy.ply", "copy-sheet.png", "copy-turntable.mp4"]
    assert result["bits"] == 96 * result["tokens"]
    assert result["views"] == "unseen"
    assert 0 < result["psnr"] < 60
    sheet = load_image("copy-sheet.png")
    assert sheet.shape == (512, 8 * 256, 3)
    orange = (np.abs(sheet[:256].astype(int) - [230, 128, 26]) < 60).all(axis=-1)
    assert orange.any()
    clip = VideoReader("copy-turntable.mp4")
    assert (clip.height, clip.width) == (256, 512)


def test_folders_hold_assets_too(atoken: Atoken, box: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "things"
    (folder / "mesh").mkdir(parents=True)
    for name in ("box.obj", "box.mtl"):
        (folder / "mesh" / name).write_text((box.parent / name).read_text())
    from PIL import Image

    with (folder / "mesh" / "box.mtl").open("a") as file:
        file.write("map_Kd texture.png\n")
    Image.new("RGB", (20, 20)).save(folder / "mesh" / "texture.png")
    Image.new("RGB", (20, 20)).save(folder / "photo.png")
    outcome = atoken("encode", folder, "--out", "tokens", "--json")
    assert outcome.status == 0, outcome.err
    assert sorted(result["out"] for result in outcome.json["results"]) == ["tokens/mesh/box.atok", "tokens/photo.atok"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.glb", b"", "empty"),
        ("foreign.obj", b"\x89PNG\r\n\x1a\n" * 9, "foreign.obj"),
        ("flat.off", b"OFF\n3 1 0\n0 0 0\n0 0 0\n0 0 0\n3 0 1 2\n", "flat.off"),
        ("transforms.json", b'{"frames": []}', "transforms"),
    ],
)
def test_bad_assets_are_one_line(atoken: Atoken, name: str, content: bytes, message: str) -> None:  # noqa: F811
    Path(name).write_bytes(content)
    for command, out in (("encode", "x.atok"), ("reconstruct", "x.ply")):
        outcome = atoken(command, name, "--out", out)
        assert outcome.status == 1
        assert outcome.err.startswith("error: ")
        assert outcome.err.count("\n") == 1
        assert message in outcome.err
        assert {path.name for path in Path.cwd().iterdir()} == {name}
