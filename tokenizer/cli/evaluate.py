"""`atoken evaluate`: options to `tokenizer.evaluation.command`, and its results for people or as JSON."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenizer.cli.options import Device, Dtype, Json, Precision
from tokenizer.errors import InputError

if TYPE_CHECKING:
    import torch

    from tokenizer.api import AToken

Paths = Annotated[list[Path] | None, typer.Option("--diffusers", help="Folder of an autoencoder of diffusers.")]
Names = Annotated[str | None, typer.Option("--metrics", help="Of psnr,ssim,lpips,frechet,zero-shot,retrieval.")]


def evaluate(
    data: Annotated[str, typer.Option(help="Folder, file or shards; 'packaged' for the packaged test pictures.")],
    out: Annotated[Path, typer.Option(help="Folder for results and report.", show_default=False)],
    model: Annotated[
        list[str] | None, typer.Option(help="Bundled model, folder, or released file; may be repeated.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Protocol: native, imagenet-256, coco-256, ...")] = "native",
    metrics: Names = None,
    baselines: Annotated[
        str | None, typer.Option(help="Of jpeg,webp,linear,x264,flat, or 'none'; all by default.")
    ] = None,
    linear: Annotated[
        Path | None, typer.Option(help="Saved linear code (.npz), or a run's YAML, to fit one to its data.")
    ] = None,
    diffusers: Paths = None,
    adapter: Annotated[list[str] | None, typer.Option(help="Any tokenizer, as module:Class.")] = None,
    text: Annotated[Path | None, typer.Option(help="Folder of SigLIP 2, whose text tower names classes.")] = None,
    labels: Annotated[Path | None, typer.Option(help="JSON: class (folder of a sample) to its name.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text of a class, with {} for its name; may be repeated.")
    ] = None,
    captions: Annotated[Path | None, typer.Option(help="JSON: name of a sample to its caption or captions.")] = None,
    fid_weights: Annotated[Path | None, typer.Option(help="Inception weights of FID; else from the cache.")] = None,
    fvd_weights: Annotated[Path | None, typer.Option(help="I3D weights of FVD; else from the cache.")] = None,
    gaussians: Annotated[Path | None, typer.Option(help="Gaussian decoder for 3D, if not the models' own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Measure only the first so many samples.")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap, and of a linear code that is fitted.")] = 0,
    device: Device = "auto",
    dtype: Precision = Dtype.auto,
    discrete: Annotated[bool, typer.Option("--discrete", help="Bundled models as codebook indices.")] = False,
    card: Annotated[bool, typer.Option("--card", help="Write the figures into the card of the model.")] = False,
    as_json: Json = False,
) -> int:
    """Measure tokenizers on a data set: reconstruction, understanding, cost, and baselines of the same size.

    Writes results.json, samples.jsonl, results.md and report.html, a page with pictures, players and plots. A run that
    was interrupted goes on when it is started again with the same arguments; broken files are named and left out.
    Under torchrun every process measures a share: torchrun --nproc-per-node 8 -m tokenizer.cli evaluate ...

    Presets: native (as the files are), imagenet-256, coco-256, davis-1080p, tokenbench-720p, msrvtt-1ka, toys4k, nano.
    Captions lie beside files as NAME.txt, one a line; the class of a file is its folder.

    \b
    Examples:
      atoken demo --out atoken-demo
      atoken evaluate --model atoken-nano --data atoken-demo/coffee.jpg --preset imagenet-256 --out evaluation
    """
    from tokenizer.cli.models import choose_device, choose_dtype, load_model, with_discrete
    from tokenizer.cli.progress import ProgressBars
    from tokenizer.evaluation.command.evaluate import Options, Progress
    from tokenizer.evaluation.command.evaluate import evaluate as run
    from tokenizer.evaluation.command.presets import find_preset

    place = choose_device(device)

    def load(name: str, on: torch.device) -> AToken:
        loaded = load_model(name, str(on), dtype, discrete=discrete)
        if gaussians is not None:
            loaded.load_gaussian_decoder(gaussians, dtype=loaded.dtype)
        return loaded

    options = Options(
        # By the name of what is measured, whose file results and cards state.
        models=[with_discrete(name, discrete=discrete) for name in model or []],
        data=data,
        out=out,
        preset=find_preset(preset),
        device=place,
        dtype=choose_dtype(dtype, place),
        metrics=None if metrics is None else frozenset(_names(metrics)),
        baselines=None if baselines is None else [] if baselines == "none" else _names(baselines),
        linear=linear,
        diffusers=diffusers or [],
        adapters=adapter or [],
        text=text,
        labels=labels,
        captions=captions,
        prompts=prompt or [],
        fid_weights=fid_weights,
        fvd_weights=fvd_weights,
        limit=limit,
        seed=seed,
        card=card,
        command=_command(),
    )
    with ProgressBars(0) as bars:
        shown = _Shown(bars)
        results = run(options, load, Progress(shown.total, shown.done, _remark))
    if results is None:
        return 0
    if card:
        from tokenizer.evaluation.card import read_samples, update_card

        print(f"wrote {update_card(results, read_samples(out))}", file=sys.stderr)
    print(json.dumps(results, indent=2) if as_json else _summary(results, out))
    return 0


class _Shown:
    """Moves a bar to a number of samples."""

    def __init__(self, bars: Any) -> None:
        self._bars, self._at = bars, 0

    def total(self, count: int) -> None:
        self._bars.start_frames("samples", count)

    def done(self, count: int) -> None:
        self._bars.advance_frames(count - self._at)
        self._at = count


def _names(text: str) -> list[str]:
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise InputError(f"'{text}': give names with commas between them")
    return list(dict.fromkeys(found))


def _remark(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)


def _command() -> str:
    return shlex.join(["atoken", *sys.argv[1:]])


def _summary(results: dict[str, Any], out: Path) -> str:
    from tokenizer.evaluation.command.markdown import count_line, table

    lines = []
    for kind, rows in results["kinds"].items():
        lines += [kind, *table(rows, interval=False), ""]
    return "\n".join([*lines, count_line(results), f"in {out}: report.html, results.md, results.json, samples.jsonl"])
