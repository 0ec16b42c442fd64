"""Rasterising: seconds and peak memory, forward and forward + backward, for two kinds of scene.

"small" is what voxels decode to: Gaussians of 0.004 to 0.01 on the surface of a ball that fills the picture. "random"
has Gaussians all through the cube from 0.002 to 0.2, uniform in the logarithm. Opacities are uniform in both.

`python -m benchmarks.rasterize` prints the table alone; `benchmarks.assets` takes `measure` and `table` from here.
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

from benchmarks.machine import describe, seconds
from tokenizer.cameras import sphere_cameras
from tokenizer.gaussians.rasterize import Engine, rasterize_tensors

SceneName = Literal["small", "random"]

RADIUS = 0.5
"""Of the sphere that fills the picture, in world units."""


@dataclass(frozen=True)
class Case:
    """One view of random Gaussians; `backward` adds the gradients of a loss on colours and alpha."""

    scene: SceneName
    backward: bool
    gaussians: int = 50_000
    size: int = 256
    engine: Engine = "auto"

    @property
    def direction(self) -> str:
        return "forward + backward" if self.backward else "forward"

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
        return [tensor.to(device).requires_grad_(self.backward) for tensor in scene]


def draw(case: Case, attributes: list[Tensor]) -> None:
    """One call of the rasteriser, with the gradients of all attributes if the case asks for them."""
    means, scales, rotations, opacities, colours = attributes
    camera = sphere_cameras(1, RADIUS)
    picture = rasterize_tensors(means, scales, rotations, opacities, colours, camera, case.size, engine=case.engine)
    if case.backward:
        loss = picture.colours.square().mean() + picture.alpha.square().mean()
        torch.autograd.grad(loss, attributes)


def measure(device: torch.device, repeats: int, gaussians: int = 50_000, size: int = 256) -> list[dict[str, Any]]:
    """One record for each scene and direction: the fastest of `repeats` calls, and the peak memory of one call."""
    scenes: tuple[SceneName, ...] = ("small", "random")
    cases = [Case(scene, backward, gaussians, size) for scene in scenes for backward in (False, True)]
    return [_record(case, device, repeats) for case in cases]


def _record(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    attributes = case.attributes(device)
    return {
        "scene": case.scene,
        "direction": case.direction,
        "gaussians": case.gaussians,
        "size": case.size,
        "seconds": seconds(lambda: draw(case, attributes), device, repeats),
        "peak MB": peak_memory(case, device) / 1e6,
    }


def peak_memory(case: Case, device: torch.device) -> int:
    """Bytes that one call holds at most beyond its inputs.

    On a CPU it is the growth of a new process, as one that ran before keeps freed memory and would show no growth.
    """
    if device.type == "cuda":
        attributes = case.attributes(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        draw(case, attributes)
        return torch.cuda.max_memory_allocated(device) - before
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_growth, case, torch.get_num_threads()).result()


def _growth(case: Case, threads: int) -> int:
    """Growth of this process's resident memory during one call, looked at every millisecond."""
    torch.set_num_threads(threads)
    small = replace(case, gaussians=10, size=8)
    draw(small, small.attributes(torch.device("cpu")))  # what is loaded on first use does not count
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
        draw(case, attributes)
    finally:
        done.set()
        watcher.join()
    return max(peak, process.memory_info().rss) - before


def table(records: list[dict[str, Any]], title: str) -> Table:
    """The records of `measure` for the terminal."""
    result = Table(title=title)
    for column in ("scene", "direction", "Gaussians", "picture", "seconds", "peak MB"):
        result.add_column(column, justify="left" if column in ("scene", "direction") else "right")
    for record in records:
        result.add_row(
            record["scene"],
            record["direction"],
            f"{record['gaussians']:,}",
            f"{record['size']} x {record['size']}",
            f"{record['seconds']:.3f}",
            f"{record['peak MB']:.0f}",
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
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    machine = describe(device)
    records = measure(device, options.repeats, options.gaussians, options.size)
    title = f"rasterising on {machine['device']}, {machine['threads']} threads, torch {machine['torch']}"
    Console().print(table(records, title))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
