"""FP8 as a switch of a run, by emulation: it trains, goes on bit for bit, leaves plain models; both engines take it.

What it costs in loss is tested by `test_fp8` and measured by `benchmarks.fp8`, which layers take it by
`test_fp8_layers` and `test_megatron_config`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tokenizer.curriculum_data import ROOT, lines, make_sets, pictures_alone
from tokenizer.api import AToken
from tokenizer.checkpoints import WEIGHTS_FILE
from tokenizer.errors import InputError
from tokenizer.megatron.pretrain import layout_of
from tokenizer.training.curriculum import records
from tokenizer.training.curriculum.checkpoint import newest_good, read_tensors
from tokenizer.training.curriculum.config import RunConfig
from tokenizer.training.curriculum.launch import train
from tokenizer.training.curriculum.torch_engine import TorchEngine

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
TENSORWISE = "fp8={}"
DELAYED = "fp8={fp8_recipe: delayed, fp8_amax_history_len: 4}"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smoke")
    make_sets(folder, videos=False)
    return folder


@pytest.fixture
def here(sets: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(sets)
    monkeypatch.setattr(records, "has_tensorboard", lambda: False)
    return sets


def run(out: Path, *overrides: str) -> RunConfig:
    quiet = ("validation.every=100", "log.pictures_every=100", "checkpoint.every=2")
    return pictures_alone("precision=bf16", *quiet, f"out={out}", *overrides)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / WEIGHTS_FILE)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("fp8", [TENSORWISE, DELAYED])
def test_a_run_in_fp8_goes_on_bit_for_bit_and_leaves_a_plain_model(
    fp8: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, peace, broken, twice = (tmp_path / name for name in ("plain", "peace", "broken", "twice"))
    assert train(run(plain, "steps=6"), CPU) == 0
    assert "FP8" not in capsys.readouterr().err
    assert train(run(peace, "steps=6", fp8), CPU) == 0
    recipe = "delayed" if fp8 == DELAYED else "tensorwise"
    assert capsys.readouterr().err.count(f"FP8 hybrid, {recipe}, emulated: ") == 1

    right, calls = TorchEngine.forward_backward, iter(range(100))

    def breaks(self: TorchEngine, prepared: Any) -> dict[str, float]:
        if next(calls) == 5:  # the checkpoint has 4 steps, and a fifth is done
            raise RuntimeError("power failure")
        return right(self, prepared)

    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "forward_backward", breaks)
        with pytest.raises(RuntimeError, match="power failure"):
            train(run(broken, "steps=6", fp8), CPU)
    assert train(run(broken, "steps=6", fp8), CPU) == 0
    assert (broken / "metrics.jsonl").read_text() == (peace / "metrics.jsonl").read_text()
    ours, again, theirs = weights(peace), weights(broken), weights(plain)
    assert all(torch.equal(tensor, again[name]) for name, tensor in ours.items())

    # What is computed again on the way back is what it was, and is remembered as often.
    assert train(run(twice, "steps=6", "recompute=true", fp8), CPU) == 0
    assert (twice / "metrics.jsonl").read_text() == (peace / "metrics.jsonl").read_text()

    # FP8 was at work, and left nothing of itself.
    assert {name: (t.shape, t.dtype) for name, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    assert not all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    losses = [[line["loss"] for line in lines(out / "metrics.jsonl") if "loss" in line] for out in (peace, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert AToken.from_pretrained(peace / "model").config.name == "smoke"


@pytest.mark.usefixtures("here")
def test_a_run_may_go_on_with_fp8_changed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    for steps, fp8 in ((2, "fp8=null"), (4, DELAYED), (6, TENSORWISE), (8, DELAYED)):
        assert train(run(out, f"steps={steps}", fp8), CPU) == 0
        newest = newest_good(out / "checkpoints")
        assert newest is not None
        histories = read_tensors(newest)["fp8"]
        assert bool(histories) == (fp8 == DELAYED)
        assert all((history[:, :2] > 0).all() for history in histories.values())
    assert [line["step"] for line in lines(out / "metrics.jsonl") if "loss" in line] == list(range(1, 9))
    with pytest.raises(InputError, match="choose the backend and fp8_amax_history_len of the checkpoint") as error:
        train(run(out, "steps=9", "fp8={fp8_recipe: delayed, fp8_amax_history_len: 5}"), CPU)
    assert "\n" not in str(error.value)


def test_processes_that_share_gradients_or_weights_train_in_fp8(sets: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "tokenizer" / "fp8_worker.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=sets, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[Any]] = {
        layout: [torch.load(tmp_path / f"{layout}-{rank}.pt") for rank in range(2)] for layout in ("ddp", "fsdp2")
    }
    for first, second in found.values():
        assert first["losses"] == second["losses"]
        assert first["histories"].keys() == second["histories"].keys()
        for name, history in first["histories"].items():
            # The processes saw different pictures, and scale by the larger ones from now on.
            assert torch.equal(history, second["histories"][name])
            assert (history[:, :3] > 0).all()
        assert first["onward"][0] == first["onward"][1]
        assert first["fused"] == second["fused"] == [3.0, 4.0]
    assert found["ddp"][0]["losses"] == pytest.approx(found["fsdp2"][0]["losses"], rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("precision=fp32", "fp8={}"), "fp8 stands among bfloat16 layers, but precision is fp32; set precision=bf16"),
        (("fp8={fp8_formatt: e4m3}",), "unknown key 'fp8.fp8_formatt'; did you mean 'fp8.fp8_format'"),
        (("fp8={backend: torchao, fp8_recipe: delayed}",), "torchao has no delayed scaling"),
        (
            ("fp8={backend: transformer_engine, fast_accumulation: all}",),
            "Transformer Engine sums fast forward alone; set fp8.backend to triton or torchao",
        ),
        (("fp8={keep: ['decoder.mlp']}",), "fp8.keep: no FP8 layer is called 'decoder.mlp'"),
        (("fp8={backend: transformer_engine}",), "needs CUDA"),
    ],
)
@pytest.mark.usefixtures("here")
def test_impossible_fp8_is_refused_before_the_first_step(tmp_path: Path, settings: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        train(run(tmp_path / "run", *settings), CPU)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_megatron_takes_the_same_switch(tmp_path: Path) -> None:
    assert layout_of(run(tmp_path), "run.yaml").fp8_format is None
    switched = layout_of(run(tmp_path, "fp8={num_layers_at_end_in_bf16: 1, fp8_format: e4m3}"), "run.yaml")
    assert (switched.transformer_impl, switched.bf16) == ("transformer_engine", True)
    assert (switched.fp8_format, switched.fp8_recipe) == ("e4m3", "tensorwise")
    assert (switched.num_layers_at_end_in_bf16, switched.fp8_amax_history_len) == (1, 1024)
    with pytest.raises(InputError, match=r"fp8\.fast_accumulation is all, but Transformer Engine"):
        layout_of(run(tmp_path, "fp8={fast_accumulation: all}"), "run.yaml")
    # What its own section says counts more.
    assert layout_of(run(tmp_path, "recompute=true"), "run.yaml").recompute_num_layers == 1
    chosen = layout_of(run(tmp_path, "recompute=true", "megatron={recompute_granularity: selective}"), "run.yaml")
    assert (chosen.recompute_granularity, chosen.recompute_method) == ("selective", None)
    own = layout_of(run(tmp_path, DELAYED, "megatron={fp8_format: e4m3, fp8_margin: 2}"), "run.yaml")
    assert (own.fp8_format, own.fp8_margin, own.fp8_recipe, own.fp8_amax_history_len) == ("e4m3", 2, "delayed", 4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("fp8={backend: torchao}",), "fp8.backend is torchao, but Megatron's FP8 is Transformer Engine's"),
        (("fp8={keep: ['*.mlp.down']}",), "set fp8.num_layers_at_start_in_bf16"),
        (("fp8={}", "megatron.transformer_impl=local"), "the local layers have no FP8"),
        (("optimizer.muon_lr=0.002",), "optimizer.muon_lr and plain_lr belong to atoken train"),
        (("optimizer.plain_lr=0.002",), "optimizer.muon_lr and plain_lr belong to atoken train"),
    ],
)
def test_megatron_refuses_what_it_has_not(tmp_path: Path, settings: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        layout_of(run(tmp_path, *settings), "run.yaml")
    assert "\n" not in str(error.value)
