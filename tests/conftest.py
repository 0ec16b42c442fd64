"""What all tests share: thread counts, system programs, recorded data, small pictures and clips."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tokenizer import AToken, ATokenConfig, checkpoints
from tokenizer.gaussians import GaussianDecoder, GaussianDecoderConfig
from tokenizer.model.config import FSQConfig, TransformerConfig

TINY_GAUSSIANS = GaussianDecoderConfig(
    width=12, depth=1, heads=2, mlp_width=16, window=4, resolution=12, gaussians=8, packing="surface"
)

# More threads than this only get in each other's way on tensors as small as the tests'.
torch.set_num_threads(min(2, os.cpu_count() or 1))

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell makes what it starts in the background ignore SIGINT, and so would every process of the tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For a module of small layers: they take ten times as long where two threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def needs_program() -> Callable[[str], None]:
    """Call with a program's name: where it is missing the test is skipped, but fails under CI, which installs it."""

    def check(name: str) -> None:
        if shutil.which(name) is None:
            reason = f"the program {name} is not installed"
            pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)

    return check


@pytest.fixture(scope="session")
def golden() -> Path:
    """Tensors recorded from the released code; their README.json describes them."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of random models with the patches and latents of the bundled ones: atoken-nano and atoken-nano-d."""
    folder = tmp_path_factory.mktemp("pretrained")
    encoder = TransformerConfig(width=32, depth=1, heads=2, mlp_width=48, norm="layer", bias=True, qk_norm=False)
    decoder = TransformerConfig(width=32, depth=1, heads=2, mlp_width=48, norm="rms", bias=False, qk_norm=True)
    for name, quantizer in (("atoken-nano", None), ("atoken-nano-d", FSQConfig())):
        model = AToken(ATokenConfig(name=name, encoder=encoder, decoder=decoder, quantizer=quantizer))
        model.reset_parameters(torch.Generator().manual_seed(len(name)))
        gaussians = GaussianDecoder(TINY_GAUSSIANS)
        gaussians.reset_parameters(torch.Generator().manual_seed(len(name)))
        model.use_gaussian_decoder(gaussians.eval().requires_grad_(False))
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def bundled(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the tiny random models the bundled ones, for commands that run in this process."""
    monkeypatch.setattr(checkpoints, "PRETRAINED", tiny_models)
    return tiny_models


@pytest.fixture(scope="session")
def picture() -> NDArray[np.uint8]:
    """A coloured picture without sharp edges, uint8 [45, 61, 3]; both sides odd."""
    return np.asarray(_scene(1, 45, 61)[0])


@pytest.fixture(scope="session")
def clip() -> NDArray[np.uint8]:
    """A moving version of it, uint8 [10, 45, 61, 3]; frames, height and width fit no patch."""
    return _scene(10, 45, 61)


def _scene(frames: int, height: int, width: int) -> NDArray[np.uint8]:
    t, row, column = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    red = 128 + 100 * np.sin((column + 2 * t) / 9)
    green = 255 * row / height
    blue = 40 + 190 * np.exp(-((row - height / 2) ** 2 + (column - width / 2 - t) ** 2) / 150)
    scene: NDArray[np.uint8] = np.stack([red, green, blue], axis=-1).astype(np.uint8)
    return scene
