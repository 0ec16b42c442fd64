"""The trainer: exact on resume, its state whole on disk, steps that fail left out, rates and averages as written."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.sources.store import StoreWriter
from tests.tokenizer.networks import small_config
from tests.tokenizer.test_checkpoints import contents, full_disk, refused
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.config import ATokenConfig, FSQConfig, SkipConfig
from tokenizer.training import objective as objective_module
from tokenizer.training import trainer as trainer_module
from tokenizer.training.config import BatchConfig, LossConfig, OptimizerConfig, TrainConfig
from tokenizer.training.optimizer import MovingAverage, make_optimizers, rate_factor
from tokenizer.training.store import VALIDATION_SHARE, CropBatch, TrainingStore
from tokenizer.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
PATCH = (4, 4, 4)
BATCH = BatchConfig(
    images=3, clips=2, image_sides=(8, 12), clip_sides=(8,), clip_frames=8, kinds={"photograph": 1.0, "film": 1.0}
)
TINY = replace(small_config(), skip=SkipConfig(still_codes=3, clip_codes=2))
State = dict[str, Tensor]


def smooth(rng: np.random.Generator, *shape: int) -> NDArray[np.uint8]:
    """Waves of random colour, phase and direction, with a little noise: pixels that predict each other."""
    axes = np.meshgrid(*(np.arange(size) for size in shape), indexing="ij")
    phase = sum(rng.uniform(-0.4, 0.4) * axis for axis in axes)
    colours = [120 + 90 * np.sin(phase + rng.uniform(0, 6)) for _ in range(3)]
    noisy: NDArray[np.uint8] = (np.stack(colours, axis=-1) + rng.integers(-8, 9, (*shape, 3))).astype(np.uint8)
    return noisy


def file_name(stem: str, *, validation: bool) -> str:
    """A name that puts a file into the validation part of a store, or into the other."""
    names = (f"{stem}-{number}" for number in itertools.count())
    return next(name for name in names if (zlib.crc32(name.encode()) % VALIDATION_SHARE == 0) == validation)


def write_store(folder: Path) -> Path:
    """40 pictures and 40 clips, each eighth for validation."""
    rng, writer = np.random.default_rng(0), StoreWriter(folder)
    for number in range(40):
        name = file_name(f"file{number}", validation=number % 8 == 0)
        writer.add(smooth(rng, 20, 24), "photograph", "tests", name, "CC0-1.0")
        writer.add(smooth(rng, 9, 16, 18), "film", "tests", name, "CC0-1.0")
    writer.finish(seed=0)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store"))


def config(store: Path, out: Path, **changes: Any) -> TrainConfig:
    run = TrainConfig(
        model="nano",
        name="tiny",
        steps=12,
        data=str(store),
        out=str(out),
        batch=BATCH,
        loss=LossConfig(l1=0.5, psnr=0.05, kl=1e-6),
        optimizer=OptimizerConfig(lr=2e-3, muon_lr=2e-3, warmup=3, ema=0.9),
        precision="fp32",
        validate_every=5,
        save_every=4,
    )
    return replace(run, **changes)


def network(sizes: ATokenConfig = TINY) -> ATokenNetwork:
    drawn = ATokenNetwork(sizes)
    drawn.reset_parameters(torch.Generator().manual_seed(0))
    return drawn


def trainer(run: TrainConfig, sizes: ATokenConfig = TINY) -> Trainer:
    return Trainer(run, network(replace(sizes, quantizer=run.quantizer)), None, torch.device("cpu"))


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if "seconds" not in key} for record in records]


# ---------------------------------------------------------------------- stopping and going on


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16", "quantizer": FSQConfig(codebooks=2)},
        {"optimizer": OptimizerConfig(lr=2e-3, warmup=0, skip_lr=0.0, plain_lr=1e-3)},
    ],
    ids=["muon", "bf16 discrete", "adamw"],
)
def test_a_stopped_run_goes_on_exactly(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    straight = trainer(config(store, tmp_path / "straight", **changes))
    final = straight.run()

    stopped = trainer(config(store, tmp_path / "stopped", **changes))
    whole_step = Trainer._step

    def interrupted(self: Trainer, step: int) -> dict[str, float]:
        if step == 10:
            raise KeyboardInterrupt
        return whole_step(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stopped.run()
    with (tmp_path / "stopped" / "log.jsonl").open("a") as log:
        log.write('{"step": 11, "lo')  # as a kill in the middle of a line leaves it
    again = trainer(config(store, tmp_path / "stopped", **changes))
    assert same(again.run().state_dict(), final.state_dict())
    assert same(again.network.state_dict(), straight.network.state_dict())
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("straight", "stopped")]
    for moments in zip(*(state["optimizers"] for state in states), strict=True):
        for one, other in zip(*(moment["state"].values() for moment in moments), strict=True):
            assert same(one, other)
    assert torch.equal(states[0]["generator"], states[1]["generator"])
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "straight")
    assert [record["step"] for record in log_of(tmp_path / "stopped")] == [0, 5, 10, 12]
    finished = trainer(config(store, tmp_path / "stopped", **changes))
    assert same(finished.run().state_dict(), final.state_dict())  # nothing is left to do


RUN = """
import os, signal, sys
sys.path.insert(0, {root!r})
from tests.tokenizer.test_training import TINY
from tokenizer.model.config import CONFIGS
from tokenizer.training import __main__ as command, state
CONFIGS["nano"] = TINY
saves = 0
whole = state.write_pt

def half_of_the_second(value, path):
    global saves
    saves += 1
    whole(value, path)
    if saves == 2:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1] == "killed":
    state.write_pt = half_of_the_second
sys.exit(command.main(sys.argv[2:]))
"""


def test_a_run_killed_while_it_saves_goes_on_exactly(store: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of the second state, through the command of the README, from fitted codes to the model."""
    (tmp_path / "run.yaml").write_text(
        f"model: nano\nname: tiny\nsteps: 9\ndata: {store}\nsave_every: 3\nvalidate_every: 4\nprecision: bf16\n"
        "code_patches: 640\ncode_iterations: 3\noptimizer: {warmup: 2}\nbatch: {images: 2, clips: 1, clip_frames: 8,\n"
        "  image_sides: [8], clip_sides: [8], kinds: {photograph: 1, film: 1}}\n"
    )

    def run(how: str, out: str) -> subprocess.CompletedProcess[str]:
        code = RUN.format(root=str(ROOT))
        command = [sys.executable, "-c", code, how, "--config", "run.yaml", "--device", "cpu", f"out={out}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    assert run("killed", "killed").returncode == -signal.SIGKILL
    state = torch.load(tmp_path / "killed" / "state.pt", weights_only=True)
    assert state["step"] == 3
    assert not (tmp_path / "killed" / "model").exists()
    for out in ("killed", "straight"):
        result = run("to the end", out)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("linear codes, PSNR in dB: stills ")
    for name in ("model/config.json", "model/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "straight")


def test_a_full_disk_keeps_the_state_before(store: Path, tmp_path: Path) -> None:
    trainer(config(store, tmp_path, steps=4)).run()
    before = contents(tmp_path)["state.pt"]
    with full_disk(20_000), pytest.raises(OSError, match="File too large"):
        trainer(config(store, tmp_path, steps=8)).run()
    assert contents(tmp_path)["state.pt"] == before
    assert sorted(contents(tmp_path)) == ["log.jsonl", "state.pt"]


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"seed": 1}, "seed"), ({"batch": replace(BATCH, images=4)}, "batch"), ({"loss": LossConfig(l2=1)}, "loss")],
)
def test_other_settings_are_another_run(store: Path, tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    trainer(config(store, tmp_path, steps=2)).run()
    text = refused(trainer(config(store, tmp_path, **changes)).run)
    assert text.startswith(f"{tmp_path / 'state.pt'} belongs to a run with other settings ({key}); ")
    trainer(config(store, tmp_path, steps=3, save_every=1, validate_every=1)).run()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04"])
def test_a_damaged_state_is_one_line(store: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.pt").write_bytes(content)
    assert "remove it to start anew" in refused(trainer(config(store, tmp_path)).run)


# ---------------------------------------------------------------------- steps


def spoil(monkeypatch: pytest.MonkeyPatch, steps: range, how: Callable[[Tensor], Tensor]) -> None:
    whole = objective_module.Objective.__call__

    def spoilt(self: Any, net: ATokenNetwork, batch: CropBatch, step: int, generator: torch.Generator) -> Any:
        loss, terms = whole(self, net, batch, step, generator)
        return (how(loss) if step in steps else loss), terms

    monkeypatch.setattr(objective_module.Objective, "__call__", spoilt)


def test_a_step_that_is_not_finite_is_left_out(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(config(store, tmp_path, steps=6))
    spoil(monkeypatch, range(2, 4), lambda loss: loss * torch.inf)
    seen: list[State] = []
    counts: list[int] = []
    whole_step = Trainer._step

    def watched(self: Trainer, step: int) -> dict[str, float]:
        record = whole_step(self, step)
        seen.append({name: tensor.clone() for name, tensor in self.network.state_dict().items()})
        counts.append(self.bad_steps)
        return record

    monkeypatch.setattr(Trainer, "_step", watched)
    run.run()
    assert counts == [0, 0, 1, 2, 0, 0]
    assert [same(one, other) for one, other in itertools.pairwise(seen)] == [False, True, True, False, False]


def test_a_run_that_diverged_stops_with_one_line(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "MAX_BAD_STEPS", 5)
    run = trainer(config(store, tmp_path))
    spoil(monkeypatch, range(4, 100), lambda loss: loss * torch.nan)
    assert refused(run.run).startswith(
        "5 steps in a row up to step 8 had a loss or gradient that is not finite; lower "
    )
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 8  # whole, with the parameters of step 4
    # The same if it is the network itself that overflows, which the decoder would refuse.
    run = trainer(config(store, tmp_path / "other"))
    with torch.no_grad():
        run.network.encoder.to_posterior.weight[TINY.latent_channels :] = 1e30
    assert "5 steps in a row up to step 4 " in refused(run.run)


@pytest.mark.parametrize("quantizer", [None, FSQConfig(codebooks=2)])
def test_the_loss_falls_on_a_batch_seen_again_and_again(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantizer: FSQConfig | None
) -> None:
    loss = LossConfig(l1=1.0, kl=1e-8)
    run = trainer(config(store, tmp_path, steps=80, quantizer=quantizer, loss=loss), replace(small_config(), skip=None))
    batch = run.store.batch(BATCH, PATCH, (0, 0))
    monkeypatch.setattr(run.store, "batch", lambda *_: batch)
    run.run()
    losses = [record["loss"] for record in log_of(tmp_path)[1:]]
    assert losses[-1] < 0.5 * losses[0]
    psnr = [record["psnr image"] for record in log_of(tmp_path) if "psnr image" in record]
    assert psnr[-1] > psnr[0] + 3  # on other pictures, too


def test_terms_are_means_over_pixels_that_exist(store: Path) -> None:
    batch = TrainingStore(store, BATCH).batch(BATCH, PATCH, (0, 5))
    net = network()
    loss, terms = objective_module.Objective(LossConfig(l1=1.0, l2=2.0, psnr=0.1, kl=0.01), None)(
        net, batch, 0, torch.Generator().manual_seed(1)
    )
    encoding = net.encode(batch.patches)
    decoded = net.decode(encoding.posterior.sample(torch.Generator().manual_seed(1))).features
    rows, target = batch.image_tokens, batch.patches.features
    pairs = {"image": (decoded[:rows, :48], target[:rows, :48]), "video": (decoded[rows:], target[rows:])}
    expected = 0.01 * encoding.posterior.kl().mean()
    for name, (ours, real) in pairs.items():
        l1, l2 = (ours - real).abs().mean(), (ours - real).square().mean()
        torch.testing.assert_close(terms[f"{name} l1"], l1)
        torch.testing.assert_close(terms[f"{name} l2"], l2)
        expected = expected + l1 + 2 * l2 - 0.1 * terms[f"{name} psnr"]
    torch.testing.assert_close(loss, expected)
    one = (pairs["video"][0] - pairs["video"][1]).square().reshape(2, -1).mean(dim=1)
    torch.testing.assert_close(terms["video psnr"], (10 * torch.log10(4 / one)).mean(), rtol=1e-3, atol=0)


def test_rates() -> None:
    optimizer = OptimizerConfig(warmup=10, decay_fraction=0.4)
    rates = [rate_factor(step, 100, optimizer) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[9:61] == [1.0] * 52
    assert rates[61:] == pytest.approx([1 - math.sqrt((step - 60) / 40) for step in range(61, 101)])
    assert rates[100] == 0
    assert rate_factor(0, 5, OptimizerConfig(warmup=0, decay_fraction=0)) == 1.0


def test_every_parameter_has_one_rate() -> None:
    net = network()
    rates = OptimizerConfig(lr=1e-3, plain_lr=2e-3, skip_lr=3e-3, muon_lr=4e-3)
    peaks: dict[int, float] = {}
    for optimizer in make_optimizers(net, rates):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert id(parameter) not in peaks
                peaks[id(parameter)] = group["peak"]
    wanted = {
        "skip.stills.decoder": 3e-3,
        "skip.logvar": 3e-3,
        "encoder.transformer.embed.weight": 1e-3,
        "encoder.transformer.embed.bias": 2e-3,
        "encoder.transformer.positions.weight": 2e-3,
        "decoder.transformer.norm.weight": 2e-3,
        "decoder.transformer.blocks.0.attention.query_norm.scale": 2e-3,
        "decoder.transformer.blocks.1.mlp.up.weight": 4e-3,
        "decoder.to_patches.weight": 1e-3,
    }
    named = dict(net.named_parameters())
    assert {name: peaks[id(named[name])] for name in wanted} == wanted
    assert len(peaks) == len(named)
    make_optimizers(net, replace(rates, skip_lr=0.0))
    assert not any(parameter.requires_grad for name, parameter in net.named_parameters() if name.startswith("skip."))


def test_moving_average() -> None:
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(net.weight, 1.0)
    average = MovingAverage(net, decay=0.5)
    expected = 1.0
    for step, value in enumerate([2.0, -3.0, 5.0, 7.0, 11.0]):
        torch.nn.init.constant_(net.weight, value)
        average.update(net, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert float(average.network.weight) == pytest.approx(expected)
    assert not average.network.weight.requires_grad
