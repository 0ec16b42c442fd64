"""What `atoken evaluate` reads beside folders: stores of assets, words in JSON files, a text tower in a folder."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file

from tests.tokenizer.evaluation_files import picture_folder
from tests.tokenizer.siglip_files import save_fast_tokenizer, save_siglip2
from tokenizer import AToken
from tokenizer.assets.load import load_mesh
from tokenizer.assets.raycast import render_views
from tokenizer.cameras import sphere_cameras
from tokenizer.demo import ASSET
from tokenizer.errors import InputError
from tokenizer.evaluation.command.datasets import open_source, read_captions, read_labels
from tokenizer.evaluation.command.presets import find_preset
from tokenizer.evaluation.command.samples import Asset, load_sample
from tokenizer.evaluation.command.understanding import find_alignment


def test_the_evaluation_split_of_a_store_is_measured_on_its_unseen_views(tmp_path: Path) -> None:
    mesh = load_mesh(ASSET).normalised()
    seen = render_views(mesh, sphere_cameras(4, mesh.radius), 32)
    unseen = render_views(mesh, sphere_cameras(3, mesh.radius, phase=1.0), 32)
    tensors = {"seen.depth": seen.depth.half()}
    for part, views in (("seen", seen), ("unseen", unseen)):
        tensors[f"{part}.colours"] = torch.from_numpy(views.colours)
        tensors[f"{part}.world_to_camera"] = views.cameras.world_to_camera.contiguous()
        tensors[f"{part}.intrinsics"] = views.cameras.intrinsics.contiguous()
    save_file(tensors, tmp_path / "bread.safetensors")
    entry = {"file": "bread.safetensors", "name": "loaf of bread", "category": "food"}
    models = [{**entry, "split": "evaluation"}, {**entry, "file": "other.safetensors", "split": "train"}]
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "models": models}))
    source = open_source(str(tmp_path))
    assert len(source) == source.facts()["samples"] == 1
    [raw] = source.read([0])
    assert (raw.id, raw.label, raw.captions) == ("bread.safetensors", "food", ("loaf of bread",))
    sample = load_sample(raw, find_preset("toys4k"))
    wanted = (unseen.composited() * 255).round().byte().numpy()
    assert (sample.frames == wanted).all()
    assert isinstance(sample.asset, Asset)
    assert len(sample.asset.wanted) == 3
    with pytest.raises(InputError, match=r"^--captions: .* holds the captions of its samples"):
        open_source(str(tmp_path), {"bread": ["a loaf"]})


def test_captions_given_for_shards_are_refused_and_for_packaged_pictures_taken(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set-000000.tar", "w") as tar:
        tar.add(picture_folder(tmp_path / "data", 1) / "blue" / "0.png", "0.png")
    assert len(open_source(str(tmp_path / "set-000000.tar"), {})) == 1
    with pytest.raises(InputError, match=r"^--captions: .*set-000000\.tar holds the captions of its samples"):
        open_source(str(tmp_path / "set-000000.tar"), {"0": ["a picture"]})
    pytest.importorskip("skimage")
    [name] = [raw.id for raw in open_source("packaged").read([0])]
    [raw] = open_source("packaged", {name: ["a picture"]}).read([0])
    assert raw.captions == ("a picture",)


def test_words_come_from_json_files_or_lie_beside_the_samples(tmp_path: Path) -> None:
    data = picture_folder(tmp_path / "data", 3)
    given = {"blue/0.png": "by path", "1": ["by stem", "twice"]}
    (tmp_path / "captions.json").write_text(json.dumps(given))
    source = open_source(str(data), read_captions(tmp_path / "captions.json"))
    words = {raw.id: raw.captions for raw in source.read(range(len(source)))}
    assert words["blue/0.png"] == ("by path",)
    assert words["red/1.png"] == ("by stem", "twice")
    assert words["blue/2.png"] == ("picture 2", "another of 2")
    (tmp_path / "labels.json").write_text(json.dumps({"n02": "tench", "n01": "goldfish"}))
    assert list((read_labels(tmp_path / "labels.json") or {}).items()) == [("n02", "tench"), ("n01", "goldfish")]
    for text in ('{"a": 1}', "[]", "{", '{"a": [""]}'):
        (tmp_path / "captions.json").write_text(text)
        with pytest.raises(InputError, match=r"captions\.json"):
            read_captions(tmp_path / "captions.json")
    with pytest.raises(InputError, match="no such folder or file"):
        open_source(str(tmp_path / "missing"))


def test_released_weights_share_the_space_of_siglip_and_others_do_not(tmp_path: Path) -> None:
    save_siglip2(tmp_path)
    save_fast_tokenizer(tmp_path)

    def model(width: int) -> AToken:
        encoder = SimpleNamespace(width=width)
        config = SimpleNamespace(encoder=encoder)
        stand_in: Any = SimpleNamespace(config=config, device=torch.device("cpu"), text_alignment=None)
        return cast(AToken, stand_in)

    alignment, reason = find_alignment(model(24), "released", tmp_path)
    assert reason is None
    assert alignment is not None
    vectors = alignment.encode_pooled(torch.full((2, 24), 3.0))
    torch.testing.assert_close(vectors, torch.full((2, 24), 24**-0.5))
    assert alignment.tower.encode(["a photo of a cat"]).shape == (1, 24)
    alignment, reason = find_alignment(model(32), "other", tmp_path)
    assert alignment is None
    assert reason == "other has vectors of 32 numbers, the text tower 24: they cannot be compared"


def test_a_tower_that_is_not_installed_is_said_and_one_that_is_named_must_be_there(tmp_path: Path) -> None:
    def tower(folder: Path | None = None) -> None:
        raise InputError(f"no weights in {folder or 'the package minilm'}")

    stand_in: Any = SimpleNamespace(text_alignment=SimpleNamespace(tower=tower))
    alignment, reason = find_alignment(cast(AToken, stand_in), "nano", None)
    assert alignment is None
    assert reason == "nano: no zero-shot accuracy and no retrieval: no weights in the package minilm"
    with pytest.raises(InputError, match=f"no weights in {tmp_path}"):
        find_alignment(cast(AToken, stand_in), "nano", tmp_path)
