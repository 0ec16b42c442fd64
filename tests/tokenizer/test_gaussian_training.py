"""Training a Gaussian decoder on rendered views: the store, the linear start, the loop, and how it is measured."""

from __future__ import annotations

import itertools
import json
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.tokenizer.test_asset_views import square, stacked
from tokenizer import AToken
from tokenizer.assets.mesh import Material, Mesh
from tokenizer.assets.packing import octants
from tokenizer.assets.raycast import render_views
from tokenizer.cameras import sphere_cameras
from tokenizer.checkpoints import find_model
from tokenizer.config import load_config
from tokenizer.errors import InputError
from tokenizer.evaluation import assets as evaluation
from tokenizer.gaussians import GaussianDecoder, GaussianDecoderConfig
from tokenizer.gaussians.attributes import SH_DEGREE_0
from tokenizer.gaussians.checkpoints import SUBFOLDER, load_gaussian_decoder, save_gaussian_decoder
from tokenizer.sparse import SparseTokens
from tokenizer.training import gaussian_trainer
from tokenizer.training.asset_store import decoded_voxels, random_views, read_store
from tokenizer.training.curriculum.curves import read_stages
from tokenizer.training.gaussian_start import ABSENT, PRESENT, start_from_octants
from tokenizer.training.gaussian_trainer import GaussianTrainConfig, GaussianTrainer
from tokenizer.training.progress import Progress
from tokenizer.training.state import load_state

CONFIG = Path("configs/tokenizer/nano-gaussians.yaml")
SMALL = GaussianDecoderConfig(
    width=12, depth=1, heads=2, mlp_width=16, window=4, resolution=8, gaussians=8, skip=True, packing="surface"
)


def thing(number: int) -> Mesh:
    """Two coloured squares, other ones for each number."""
    rng = np.random.default_rng(number)
    colours = [Material((*rng.uniform(0.2, 1.0, 3), 1.0)) for _ in range(2)]
    return stacked(*(square(h, s, c) for h, s, c in zip((-0.2, 0.2), rng.uniform(0.4, 0.9, 2), colours, strict=True)))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six small assets as `data.sources.furniture` stores them; one of them is damaged, two are for evaluation."""
    folder = tmp_path_factory.mktemp("furniture")
    models = []
    for number in range(6):
        mesh = thing(number)
        seen = render_views(mesh, sphere_cameras(6, 0.75), 48)
        unseen = render_views(mesh, sphere_cameras(3, 0.75, phase=1.0), 48)
        tensors = {"seen.depth": seen.depth.half()}
        for part, views in (("seen", seen), ("unseen", unseen)):
            tensors[f"{part}.colours"] = torch.from_numpy(views.colours)
            tensors[f"{part}.world_to_camera"] = views.cameras.world_to_camera
            tensors[f"{part}.intrinsics"] = views.cameras.intrinsics
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{number}.safetensors")
        split = "train" if number < 4 else "evaluation"
        models.append(
            {"file": f"{number}.safetensors", "name": f"thing {number}", "category": "things", "split": split}
        )
    (folder / "3.safetensors").write_bytes((folder / "3.safetensors").read_bytes()[:1000])
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "models": models}))
    return folder


def config(store: Path, out: Path, model: Path, steps: int = 6) -> GaussianTrainConfig:
    overrides = [f"data={store}", f"out={out}", f"model={model}", f"steps={steps}", "start_assets=2"]
    settings = load_config(GaussianTrainConfig, CONFIG, [*overrides, "validate_every=3", "save_every=2"])
    return replace(settings, decoder=SMALL, optimizer=replace(settings.optimizer, warmup=2))


# ---------------------------------------------------------------------- start


def test_the_start_reads_octants_off_linear_tokens() -> None:
    """Where tokens hold the octants themselves, the start gives them back as Gaussians."""
    generator = torch.Generator().manual_seed(0)
    count = 4000
    present = torch.rand(count, 8, generator=generator) < 0.6
    present[:, 0] = True
    low = torch.tensor([[(o >> 2) & 1, (o >> 1) & 1, o & 1] for o in range(8)]) * 0.5
    place = low + 0.5 * torch.rand(count, 8, 3, generator=generator)
    colour = torch.rand(count, 8, 3, generator=generator)
    features = torch.cat([place.flatten(1), colour.flatten(1), present.float()], dim=1)
    decoder = GaussianDecoder(replace(SMALL, inputs=features.shape[1]))
    decoder.reset_parameters(generator)
    counts = present * 5
    start_from_octants(decoder, [features], [place], [colour * present[..., None]], [counts])
    positions = torch.zeros(count, 4, dtype=torch.int32)
    row = torch.arange(count)
    positions[:, 1:] = torch.stack([row // 512, row // 64 % 8, row % 64], dim=1)
    with torch.no_grad():
        gaussians = decoder.gaussians(SparseTokens(features, positions, [count]))
    opacity = gaussians.opacities.unflatten(0, (count, 8))[..., 0]
    assert float((opacity[present] - PRESENT).abs().max()) < 0.02
    assert float((opacity[~present] - ABSENT).abs().max()) < 0.02
    means = ((gaussians.means + 0.5).unflatten(0, (count, 8)) * 8 - positions[:, None, 1:])[present]
    # The inverse of tanh is bent, the fit is straight: a few hundredths of a voxel remain.
    assert float((means - place[present]).square().mean().sqrt()) < 0.05
    shown = (SH_DEGREE_0 * gaussians.dc + 0.5).unflatten(0, (count, 8))
    assert float((shown - colour)[:, 0].square().mean().sqrt()) < 0.02  # octant 0 is always there


def test_a_start_needs_room() -> None:
    for odd in (replace(SMALL, skip=False), replace(SMALL, gaussians=12)):
        with pytest.raises(InputError, match="multiple of 8"):
            start_from_octants(GaussianDecoder(odd), [], [], [], [])


# ---------------------------------------------------------------------- loop


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def finished_by(trainer: GaussianTrainer) -> dict[str, torch.Tensor]:
    """The weights that a run ends with."""
    assert trainer.run() == 0
    return trainer.decoder.state_dict()


@pytest.fixture
def trainer(store: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], GaussianTrainer]:
    """Makes the trainer of a run in a folder."""
    monkeypatch.setattr(gaussian_trainer, "VALIDATION_SHARE", 3)
    return lambda out: GaussianTrainer(config(store, out, tiny_models / "atoken-nano"), torch.device("cpu"))


def test_training_learns_leaves_out_broken_assets_and_resumes_exactly(
    trainer: Callable[[Path], GaussianTrainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    straight = trainer(tmp_path / "whole")
    assert straight.run() == 0
    whole = straight.decoder.state_dict()
    assert "left out 3.safetensors" in capsys.readouterr().err
    records = log_of(tmp_path / "whole")
    assert [record["step"] for record in records] == [0, 3, 6]
    psnr = "validation/assets/psnr"
    assert records[-1][psnr] > records[0][psnr]
    assert [panel.title for panel in read_stages([tmp_path / "whole"]).panels] == ["training loss", "assets, PSNR dB"]

    stopped = trainer(tmp_path / "parts")
    original = stopped._step

    def step_until_killed(step: int) -> tuple[dict[str, float], dict[str, float]]:
        if step == 3:  # after the state of step 2 was saved
            raise KeyboardInterrupt
        return original(step)

    monkeypatch.setattr(stopped, "_step", step_until_killed)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed = finished_by(trainer(tmp_path / "parts"))
    assert log_of(tmp_path / "parts") == records
    finished = finished_by(trainer(tmp_path / "whole"))  # nothing is left to do
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
        assert torch.equal(finished[name], tensor), name
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts")]
    # What is trained and its average differ, and neither is taken for the other.
    assert not torch.equal(states[0]["network"]["skip.weight"], whole["skip.weight"])
    assert torch.equal(states[0]["average"]["skip.weight"], whole["skip.weight"])
    moments = [state["optimizers"][0]["state"] for state in states]
    for one, other in zip(*(moment.values() for moment in moments), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_goes_on_from_another_decoder(store: Path, tiny_models: Path, tmp_path: Path) -> None:
    settings = config(store, tmp_path / "run", tiny_models / "atoken-nano", steps=1)
    other = GaussianDecoder(SMALL)
    other.reset_parameters(torch.Generator().manual_seed(5))
    save_gaussian_decoder(other, tmp_path / "other")
    made = GaussianTrainer(replace(settings, start_from=str(tmp_path / "other")), torch.device("cpu"))
    made._start()
    for name, tensor in other.state_dict().items():
        assert torch.equal(made.decoder.state_dict()[name], tensor), name
    assert torch.equal(made.average.values["skip.weight"], other.skip.weight)  # type: ignore[union-attr]
    bundled = load_config(GaussianTrainConfig, CONFIG.with_stem("nano-gaussians-on"))
    assert bundled.start_from is not None
    assert bundled.decoder == load_gaussian_decoder(find_model(bundled.start_from)).config
    narrow = replace(settings, decoder=replace(SMALL, mlp_width=20), start_from=str(tmp_path / "other"))
    with pytest.raises(InputError, match="other has other sizes; set in decoder: mlp_width: 16"):
        GaussianTrainer(narrow, torch.device("cpu"))


def test_the_skip_learns_at_the_plain_rate_and_is_not_decayed(trainer: Callable[[Path], GaussianTrainer]) -> None:
    made = trainer(Path("unused"))
    settings = made.config.optimizer
    names = {parameter: name for name, parameter in made.decoder.named_parameters()}
    groups = {names[p]: group for o in made.optimizers for group in o.param_groups for p in group["params"]}
    assert sorted(groups) == sorted(names.values())
    assert settings.plain_lr is not None
    for name, group in groups.items():
        plain = name.startswith("skip.") or "norm" in name or name.endswith("bias")
        assert group["factor"] * settings.lr == pytest.approx(settings.plain_lr if plain else settings.lr)
        assert group["weight_decay"] == (0 if plain else settings.weight_decay)


Spoil = Callable[[GaussianTrainer, dict[int, float]], None]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """Multiplies the losses of a trainer's steps by factors; steps without one stay as they are."""

    def spoilt(trainer: GaussianTrainer, factors: dict[int, float]) -> None:
        whole = trainer._loss

        def loss(*arguments: Any) -> tuple[torch.Tensor, dict[str, float]]:
            value, terms = whole(*arguments)
            factor = factors.get(trainer.progress.step, 1.0) if torch.is_grad_enabled() else 1.0
            return value * factor, terms

        monkeypatch.setattr(trainer, "_loss", loss)

    return spoilt


def test_a_step_that_is_not_finite_is_left_out_counted_and_kept(
    trainer: Callable[[Path], GaussianTrainer],
    tmp_path: Path,
    spoil: Spoil,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = trainer(tmp_path)
    spoil(made, {1: math.inf, 2: math.nan, 3: 1.0})
    seen = []
    for step in range(4):
        metrics, _ = made._step(step)
        assert metrics["bad steps"] == made.progress.bad
        seen.append((made.progress.bad_row, made.decoder.embed.weight.detach().clone()))
    assert [bad for bad, _ in seen] == [0, 1, 2, 0]
    assert [torch.equal(one[1], other[1]) for one, other in itertools.pairwise(seen)] == [True, True, False]
    assert (made.progress.step, made.progress.bad) == (4, 2)
    files = sorted((tmp_path / "bad-steps").iterdir())
    assert [file.name for file in files] == ["step-000001.pt", "step-000002.pt"]
    assert f"step 2: loss or gradient is not finite; skipped, what it was made on is in {files[1]}" in (
        capsys.readouterr().err
    )
    # What was kept gives that step's finite loss once more.
    kept = torch.load(files[0], weights_only=True)
    rng = np.random.default_rng((made.config.seed, 0, 1))
    asset = made.training[int(rng.integers(len(made.training)))]
    assert kept["asset"] == str(asset.file)
    assert torch.equal(kept["features"], made._voxels(asset).features)
    pictures, cameras = random_views(rng, asset, made.config.views)
    assert torch.equal(kept["pictures"], pictures)
    assert torch.equal(kept["world to camera"], cameras.world_to_camera)


def test_many_steps_that_are_not_finite_end_the_run_with_its_state(
    trainer: Callable[[Path], GaussianTrainer], tmp_path: Path, spoil: Spoil, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gaussian_trainer, "MAX_BAD_STEPS", 2)
    made = trainer(tmp_path / "row")
    spoil(made, {1: math.nan, 3: math.nan, 4: math.nan})
    with pytest.raises(
        InputError, match=r"2 steps in a row up to step 4 had a loss or gradient .* another out= folder"
    ):
        made.run()
    again = trainer(tmp_path / "row")
    # States come after every second step: this one was saved for the failure.
    assert load_state(again.folder, *again._parts()) == Progress(step=5, bad_row=2, bad=3)
    again.progress = Progress(step=6, bad_row=1, bad=4)
    with pytest.raises(InputError, match=r"^4 of 6 steps had a loss or gradient that is not finite; what they were"):
        again.progress.judge(again.folder, again.records.say)


def test_a_signal_saves_the_state_and_the_run_goes_on_exactly(
    trainer: Callable[[Path], GaussianTrainer],
    tmp_path: Path,
    spoil: Spoil,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    factors = {0: math.nan}
    peace = trainer(tmp_path / "peace")
    spoil(peace, factors)
    whole = finished_by(peace)

    def run_told(part: str, when: tuple[int, ...]) -> None:
        """Run until a signal that comes in the middle of the start, or of a step."""
        told = trainer(tmp_path / "told")
        spoil(told, factors)
        original = getattr(told, part)

        def signalled(*arguments: int) -> Any:
            if arguments == when:
                signal.raise_signal(signal.SIGTERM)
            return original(*arguments)

        monkeypatch.setattr(told, part, signalled)
        assert told.run() == 128 + signal.SIGTERM

    before = signal.getsignal(signal.SIGTERM)
    run_told("_start", ())
    assert "stopped after step 0; start again to go on" in capsys.readouterr().err
    run_told("_step", (2,))
    assert "stopped after step 3; start again to go on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    again = trainer(tmp_path / "told")
    spoil(again, factors)
    # States come after every second step: this one was saved for the signal.
    assert load_state(again.folder, *again._parts()) == Progress(3, 0, 1)
    resumed = finished_by(again)
    assert log_of(tmp_path / "told") == log_of(tmp_path / "peace")
    assert again.progress == peace.progress == Progress(6, 0, 1)
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


def test_the_command_ends_as_the_run_does(
    store: Path, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(store, tmp_path / "run", tiny_models / "atoken-nano", steps=2)
    monkeypatch.setattr(gaussian_trainer, "load_config", lambda *_: settings)
    original = GaussianTrainer._step

    def signalled(self: GaussianTrainer, step: int) -> tuple[dict[str, float], dict[str, float]]:
        signal.raise_signal(signal.SIGTERM)
        return original(self, step)

    arguments = ["--config", str(CONFIG), "--device", "cpu"]
    with monkeypatch.context() as patched:
        patched.setattr(GaussianTrainer, "_step", signalled)
        assert gaussian_trainer.main(arguments) == 143
    written = tmp_path / "run" / SUBFOLDER
    assert not written.exists()
    assert gaussian_trainer.main(arguments) == 0
    assert load_gaussian_decoder(written).config == SMALL
    capsys.readouterr()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, message in (("gpu", "error: unknown device 'gpu'; use "), ("cuda", "error: there is no CUDA device")):
        assert gaussian_trainer.main(["--config", str(CONFIG), "--device", device]) == 1
        said = capsys.readouterr().err
        assert said.startswith(message)
        assert said.count("\n") == 1


def test_what_cannot_be_trained_is_one_line(store: Path, tiny_models: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no store of assets"):
        read_store(tmp_path, "train")
    (tmp_path / "manifest.json").write_text('{"models": [{"split": "train"}]}')
    with pytest.raises(InputError, match="damaged"):
        read_store(tmp_path, "train")
    (tmp_path / "manifest.json").write_text('{"models": []}')
    with pytest.raises(InputError, match="no assets of the split"):
        read_store(tmp_path, "train")
    model = AToken.from_pretrained(tiny_models / "atoken-nano", dtype=torch.float32)
    with pytest.raises(InputError, match="not a readable asset"):
        decoded_voxels(model, read_store(store, "train")[3], "surface", 8, tmp_path)
    assert gaussian_trainer.main(["--config", str(CONFIG), f"data={tmp_path}", f"out={tmp_path}/run"]) == 1
    assert gaussian_trainer.main(["--config", str(CONFIG), "veiws=3"]) == 1


# ---------------------------------------------------------------------- measuring


def test_evaluation_beside_flat_voxels(store: Path, tiny_models: Path, tmp_path: Path) -> None:
    asset = read_store(store, "evaluation")[0]
    voxels, _, colours, counts = octants(asset.views("seen"), 8)
    spheres = evaluation.flat_gaussians(asset.views("seen"), 8)
    assert len(spheres) == len(voxels.coordinates)
    mean = (colours * counts[..., None]).sum(1) / counts.sum(1, keepdim=True)
    torch.testing.assert_close(spheres.colours, mean)
    status = evaluation.main(
        ["--model", str(tiny_models / "atoken-nano"), "--data", str(store), "--out", str(tmp_path / "out")]
    )
    assert status == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    means = results["mean"]
    assert means["assets"] == 2
    assert means["flat psnr, best size of each asset"] >= means["flat psnr, one size"]
    assert means["psnr"] == pytest.approx(sum(entry["psnr"] for entry in results["assets"]) / 2)
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_psnr_of_views_is_their_mean() -> None:
    wanted = torch.zeros(2, 4, 4, 3)
    drawn = torch.stack([torch.full((4, 4, 3), 0.1), torch.full((4, 4, 3), 0.01)])
    assert evaluation.mean_psnr(drawn, wanted) == pytest.approx((20 + 40) / 2)
    assert evaluation.mean_psnr(wanted, wanted) == pytest.approx(100)
