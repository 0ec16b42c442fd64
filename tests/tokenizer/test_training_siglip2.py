"""Training with SigLIP 2 in all its places: text tower, teacher, first weights, network of the CLIP loss."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from data.config import open_training_loader
from tests.tokenizer.curriculum_data import lines, make_sets, smoke
from tests.tokenizer.siglip_files import save_fast_tokenizer, save_siglip2
from tokenizer.errors import InputError
from tokenizer.losses.distillation import distillation
from tokenizer.losses.similarity import RELEASED_SCALE
from tokenizer.patches import tokens_to_pixels
from tokenizer.text.alignment import open_tower
from tokenizer.training.curriculum import launch, records
from tokenizer.training.curriculum.config import RunConfig
from tokenizer.training.curriculum.objective import make_objective
from tokenizer.training.curriculum.preparation import Preparer
from tokenizer.training.curriculum.processes import Processes
from tokenizer.training.curriculum.start import load_previous, starting_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)

CPU = torch.device("cpu")
PATCH = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Folder with data and a checkpoint `siglip2`, tiny but for its table of positions, and the checkpoint's model."""
    folder = tmp_path_factory.mktemp("siglip2")
    make_sets(folder, videos=False)
    tower = save_siglip2(folder / "siglip2", positions=256, patch=PATCH, projection=32)
    save_fast_tokenizer(folder / "siglip2")
    return folder, tower


def settings(*overrides: str) -> RunConfig:
    return smoke(
        1,
        "text={tower: siglip2, folder: siglip2}",
        "start={kind: siglip2, source: siglip2}",
        "choices={siglip2: siglip2, clip_network: siglip2, side: 32}",
        "loss={lpips: 0, gram: 0}",
        "model.encoder.depth=2",
        "steps=2",
        "log.pictures_every=100",
        *overrides,
    )


def embedded(tower: Any, pictures: list[torch.Tensor]) -> torch.Tensor:
    """Transformers' own image embeddings of pictures [H, W, 3], one at a time."""
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    rows = []
    for picture in pictures:
        patches = torch.from_numpy(convert_image_to_patches(picture.permute(2, 0, 1).numpy(), PATCH).copy())[None]
        inputs = {"pixel_values": patches, "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.int64)}
        shape = torch.tensor([[picture.shape[0] // PATCH, picture.shape[1] // PATCH]])
        rows.append(tower.get_image_features(**inputs, spatial_shapes=shape).pooler_output[0])
    return torch.stack(rows)


@torch.no_grad()
def test_the_teacher_is_the_image_tower_of_the_checkpoint(
    model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores of the distillation, and its loss, from what transformers makes of pictures and texts."""
    folder, tower = model
    monkeypatch.chdir(folder)
    config = settings()
    texts = open_tower("siglip2", "siglip2", CPU)
    teacher = launch._teacher(config, texts, CPU)
    assert teacher is not None
    preparer = Preparer(Processes(CPU), CPU, (4, PATCH, PATCH), texts, teacher, config.seed, None)
    loader = open_training_loader(config.data, seed=0, rank=0, world=1, quarantine_file=None)
    batch = next(loader)[0]
    part = preparer([[batch]], 0)[0]
    assert part.texts is not None
    pictures = [frames[0] for frames in tokens_to_pixels(part.tokens, None, (4, PATCH, PATCH))]
    assert len({picture.shape for picture in pictures}) > 1  # pictures of one size go through the tower together
    expected = embedded(tower, pictures)
    torch.testing.assert_close(part.texts.teacher, expected, rtol=1e-5, atol=1e-5)

    # An encoder that starts there sees what the teacher sees, but for its rotary positions.
    trained = starting_model(config, texts, lambda: [])
    vectors = trained(part.tokens, part.task)["vectors"]
    _, terms = make_objective(config, CPU)(part, {"vectors": vectors}, trained.alignment.scale, None)  # type: ignore[union-attr]
    every = F.normalize(texts.encode([str(item.caption) for item in batch.items]), dim=1)
    scores = [math.exp(RELEASED_SCALE) * F.normalize(rows, dim=1) @ every.T for rows in (expected, vectors)]
    wanted = distillation(scores[0], scores[1]).mean()
    assert float(terms[f"{part.task}/semantic"]) == pytest.approx(float(wanted), rel=1e-4)
    assert float(wanted) > 0


def test_a_run_with_siglip2_in_every_place(model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = model
    monkeypatch.chdir(folder)
    monkeypatch.setattr(records, "has_tensorboard", lambda: False)
    assert launch.train(settings("out=run"), CPU) == 0
    steps = [line for line in lines(folder / "run" / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        assert line["image_reconstruction/clip"] > 0
        assert line["image_understanding/semantic"] > 0
    alignment = load_previous("run").alignment
    assert alignment is not None
    assert alignment.projection is None  # both towers of a checkpoint give vectors of one width
    assert (alignment.config.tower, alignment.config.folder) == ("siglip2", "siglip2")


def test_the_teacher_computes_as_the_run_does(model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 where the run is: GPUs have a tenth of the speed for float32. What it says is float32 anyway."""
    monkeypatch.chdir(model[0])
    monkeypatch.setattr(records, "has_tensorboard", lambda: False)
    found: dict[str, set[torch.dtype]] = {}
    made = launch._teacher

    for precision in ("fp32", "bf16"):
        kinds = found.setdefault(precision, set())

        def watched(*arguments: Any, kinds: set[torch.dtype] = kinds) -> Any:
            teacher: Any = made(*arguments)
            layer = next(part for name, part in teacher.named_modules() if name.endswith("mlp.fc1"))
            layer.register_forward_hook(lambda _, __, output: kinds.add(output.dtype))
            teacher.register_forward_hook(lambda _, __, output: kinds.add(output.dtype))
            return teacher

        monkeypatch.setattr(launch, "_teacher", watched)
        assert launch.train(settings(f"out={precision}", f"precision={precision}", "steps=1"), CPU) == 0
    assert found == {"fp32": {torch.float32}, "bf16": {torch.bfloat16, torch.float32}}


def test_towers_of_two_checkpoints_are_refused(model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model[0])
    save_siglip2(model[0] / "other", positions=256, patch=PATCH)
    save_fast_tokenizer(model[0] / "other")
    with pytest.raises(InputError, match="32 numbers, the text tower of 24; name the two towers of one checkpoint"):
        launch.train(settings("out=refused", "text.folder=other"), CPU)
    assert not (model[0] / "refused" / "metrics.jsonl").exists()
