"""Rasterising: seconds and peak memory, forward and forward + backward, for two kinds of scene.

"small" is what voxels decode to: Gaussians of 0.004 to 0.01 on the surface of a ball that fills the picture. "random"
has Gaussians all through the cube from 0.002 to 0.2, uniform in the logarithm. Opacities are uniform in both.

On a machine that does other work at the same time, set OMP_WAIT_POLICY=passive for more than one thread.

`python -m benchmarks.rasterize` measures this alone; `benchmarks.assets` takes `measure_rasterizer` from here.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import check_options, describe, find_device, seconds
from tokenizer.cameras import sphere_cameras
from tokenizer.cli.outcome import run
from tokenizer.gaussians.rasterize import Engine, Rendering, choose_engine, rasterize_tensors

SceneName = Literal["small", "random"]

RADIUS = 0.5
"""Of the sphere that fills the picture, in world units."""


@dataclass(frozen=True)
class Case:
    """One view of random Gaussians."""

    scene: SceneName
    gaussians: int = 50_000
    size: int = 256
    engine: Engine = "auto"

    def attributes(self, device: torch.device) -> list[Tensor]:
        """means, scales, rotations, opacities, colours of the scene, float32."""
        generator = torch.Generator().manual_seed(0)

        def uniform(columns: int) -> Tensor:
            return torch.rand(self.gaussians, columns, generator=generator)

        if self.scene == "small":
            directions = torch.randn(self.gaussians, 3, generator=generator)
            means = torch.nn.functional.normalize(directions, dim=1) * (0.45 + 0.02 * uniform(1))
            scales = 0.004 + 0.006 * uniform(3)
        else:
            means = uniform(3) - 0.5
            scales = 0.002 * torch.exp(uniform(3) * math.log(100.0))
        rotations = torch.nn.functional.normalize(torch.randn(self.gaussians, 4, generator=generator), dim=1)
        scene = [means, scales, rotations, uniform(1), uniform(3)]
        return [tensor.to(device) for tensor in scene]


def forward(case: Case, attributes: list[Tensor]) -> Rendering:
    """One picture."""
    means, scales, rotations, opacities, colours = attributes
    camera = sphere_cameras(1, RADIUS)
    return rasterize_tensors(means, scales, rotations, opacities, colours, camera, case.size, engine=case.engine)


def forward_and_backward(case: Case, attributes: list[Tensor]) -> None:
    """One picture, and the gradients of all attributes of a loss on its colours and alpha."""
    inputs = [tensor.detach().requires_grad_() for tensor in attributes]
    picture = forward(case, inputs)
    torch.autograd.grad(picture.colours.square().mean() + picture.alpha.square().mean(), inputs)


def measure_rasterizer(
    device: torch.device, repeats: int, gaussians: int = 50_000, size: int = 256
) -> list[dict[str, Any]]:
    """One record for each scene: the fastest of `repeats` calls, and the peak memory of forward and backward."""
    scenes: tuple[SceneName, ...] = ("small", "random")
    return [_record(Case(scene, gaussians, size), device, repeats) for scene in scenes]


def _record(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    attributes = case.attributes(device)
    return {
        "case": case.scene,
        "engine": choose_engine(case.engine, device),
        "gaussians": case.gaussians,
        "size": case.size,
        "forward seconds": seconds(lambda: forward(case, attributes), device, repeats),
        "both seconds": seconds(lambda: forward_and_backward(case, attributes), device, repeats),
        "peak megabytes": peak_memory(case, device) / 1e6,
    }


def peak_memory(case: Case, device: torch.device) -> int:
    """Bytes that forward and backward hold at most beyond the attributes.

    On a CPU it is the growth of a new process, as one that ran before keeps freed memory and would show no growth.
    """
    if device.type == "cuda":
        attributes = case.attributes(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward_and_backward(case, attributes)
        return torch.cuda.max_memory_allocated(device) - before
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_growth, case, torch.get_num_threads()).result()


def _growth(case: Case, threads: int) -> int:
    """Growth of this process's resident memory during one call, looked at every millisecond."""
    torch.set_num_threads(threads)
    small = replace(case, gaussians=10, size=8)
    forward_and_backward(small, small.attributes(torch.device("cpu")))  # what is loaded on first use does not count
    attributes = case.attributes(torch.device("cpu"))
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(1e-3):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        forward_and_backward(case, attributes)
    finally:
        done.set()
        watcher.join()
    return max(peak, process.memory_info().rss) - before


def table(records: list[dict[str, Any]], title: str) -> Table:
    """The records of `measure_rasterizer` for the terminal."""
    result = Table(title=title)
    for column in ("scene", "engine", "Gaussians", "picture", "forward s", "forward + backward s", "peak MB"):
        result.add_column(column, justify="left" if column in ("scene", "engine") else "right")
    for record in records:
        result.add_row(
            record["case"],
            record["engine"],
            f"{record['gaussians']:,}",
            f"{record['size']} x {record['size']}",
            f"{record['forward seconds']:.3f}",
            f"{record['both seconds']:.3f}",
            f"{record['peak megabytes']:.0f}",
        )
    return result


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rasterize", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gaussians", type=int, default=50_000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--threads", type=int, help="of torch, on a CPU")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    return run(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    check_options(options, "gaussians", "size", "threads", "repeats")
    device = find_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    machine = describe(device)
    records = measure_rasterizer(device, options.repeats, options.gaussians, options.size)
    title = f"rasterising on {machine['device']}, {machine['threads']} threads, torch {machine['torch']}"
    Console().print(table(records, title))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
