"""The commands `atoken shard`, `atoken data` and `atoken tokenize`; what they do is imported when they run."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenizer.errors import InputError

if TYPE_CHECKING:
    from data.shards.manifest import ShardSet


class Packing(StrEnum):
    """Values of --packing."""

    surface = "surface"
    average = "average"
    visible = "visible"
    released = "released"


class Dtype(StrEnum):
    """Values of --dtype."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


Source = Annotated[Path, typer.Argument(help="Folder of files.", metavar="SRC", show_default=False)]
Out = Annotated[Path, typer.Option(help="Folder for the result.", show_default=False)]
Table = Annotated[
    Path | None, typer.Option("--captions", help="Table of captions and labels: .csv, .tsv or .jsonl with file_name.")
]
ByFolder = Annotated[bool, typer.Option("--labels-from-folders", help="The folder of a file names its class.")]
Licence = Annotated[str, typer.Option(help="Of the files; kept in the manifest.")]
PerShard = Annotated[int, typer.Option("--per-shard", help="Files of a shard.", min=1)]
Processes = Annotated[int | None, typer.Option("--workers", help="Processes; by default one for each core.", min=1)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]

shard = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Folders of files to WebDataset shards.")
data = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Data sets: small open ones, and looking at shards."
)


@shard.command()
def images(
    source: Source,
    out: Out,
    captions: Table = None,
    labels_from_folders: ByFolder = False,
    max_side: Annotated[int | None, typer.Option(help="Reduce larger pictures to this side.", min=16)] = None,
    licence: Licence = "",
    per_shard: PerShard = 1000,
    workers: Processes = None,
    as_json: Json = False,
) -> None:
    """Pictures to shards, as they are, with captions and labels from a table or from files beside them.

    A picture NAME.jpg takes its caption from NAME.txt and other facts from NAME.json, where they exist. Pictures that
    cannot be read are left out and named in the manifest. A run that was stopped is gone on with.

    \b
    Example:
      atoken demo --out atoken-demo
      atoken shard images atoken-demo --out shards
    """
    from data.making.media import PictureMaker
    from data.making.sets import captions_for, make_set

    found = captions_for(source, captions, labels_by_folder=labels_from_folders)
    make = PictureMaker(found, max_side)
    facts = {"licence": licence, "max_side": max_side, **found.as_facts()}
    made = make_set(source, out, "images", make, samples_per_shard=per_shard, workers=_cores(workers), facts=facts)
    _report(made, out, as_json=as_json)


@shard.command()
def videos(
    source: Source,
    out: Out,
    captions: Table = None,
    labels_from_folders: ByFolder = False,
    clip_seconds: Annotated[float | None, typer.Option(help="Cut into clips of this length.", min=0.1)] = None,
    licence: Licence = "",
    per_shard: PerShard = 100,
    workers: Processes = None,
    as_json: Json = False,
) -> None:
    """Videos to shards, as they are or cut into clips, with captions and labels as for images.

    Clips are encoded anew, nearly without loss.

    \b
    Example:
      atoken demo --out atoken-demo
      atoken shard videos atoken-demo --out shards --clip-seconds 1
    """
    from data.making.media import VideoMaker
    from data.making.sets import captions_for, make_set

    found = captions_for(source, captions, labels_by_folder=labels_from_folders)
    make = VideoMaker(found, clip_seconds)
    facts = {"licence": licence, "clip_seconds": clip_seconds, **found.as_facts()}
    made = make_set(source, out, "videos", make, samples_per_shard=per_shard, workers=_cores(workers), facts=facts)
    _report(made, out, as_json=as_json)


@shard.command()
def assets(
    source: Source,
    out: Out,
    captions: Table = None,
    labels_from_folders: ByFolder = False,
    packing: Annotated[Packing, typer.Option(help="How views become voxels.")] = Packing.surface,
    resolution: Annotated[int, typer.Option(help="Voxels along an edge.", min=4, max=1024)] = 64,
    views: Annotated[int, typer.Option(help="Views of a mesh that its voxels are made from.", min=1)] = 16,
    unseen_views: Annotated[int, typer.Option(help="Views for losses alone, beside those that voxels see.", min=0)] = 8,
    licence: Licence = "",
    per_shard: PerShard = 100,
    workers: Processes = None,
    as_json: Json = False,
) -> None:
    """3D assets to shards: rendered once, stored as voxels and views, so that training never casts a ray.

    Assets are GLB, glTF, OBJ, PLY, STL and OFF meshes, and folders of views with a transforms.json.

    \b
    Example:
      atoken demo --out atoken-demo
      atoken shard assets atoken-demo --out shards --resolution 32
    """
    from data.making.assets import AssetMaker
    from data.making.sets import captions_for, make_set

    found = captions_for(source, captions, labels_by_folder=labels_from_folders)
    make = AssetMaker(found, packing.value, resolution, unseen_views, views)
    rendered = {"views": views, "unseen": unseen_views}
    facts = {"licence": licence, "rule": packing.value, "resolution": resolution, **rendered, **found.as_facts()}
    made = make_set(source, out, "assets", make, samples_per_shard=per_shard, workers=_cores(workers), facts=facts)
    _report(made, out, as_json=as_json)


@data.command()
def build(
    name: Annotated[str, typer.Argument(help="One of `atoken data list`.", show_default=False)],
    out: Out,
    source: Annotated[Path | None, typer.Option("--from", help="Where the files lie, if not in a package.")] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn at random.", min=0)] = 0,
    limit: Annotated[int | None, typer.Option(help="Only this many samples of each split.", min=1)] = None,
    max_side: Annotated[
        int | None, typer.Option(help="Reduce larger pictures to this side (photographs, clips).", min=64)
    ] = None,
    workers: Processes = None,
    as_json: Json = False,
) -> None:
    """A small open data set as shards, with captions or labels and a fixed split.

    The folder gets train and evaluation, each a set of shards. What the set needs installed is said in one line.

    \b
    Example:
      atoken data list
      atoken data build photographs --out photographs
    """
    from data.sources import catalogue

    made = catalogue.build(
        name, out, seed=seed, workers=_cores(workers), limit=limit, source_path=source, max_side=max_side
    )
    if as_json:
        print(json.dumps({split: _facts_of(part, out / split) for split, part in made.items()}, indent=2))
        return
    for split, part in made.items():
        _report(part, out / split, as_json=False)


@data.command("list")
def list_sets(as_json: Json = False) -> None:
    """The data sets that `atoken data build` makes, their licences, and whether their files are here."""
    from data.sources import catalogue

    rows = [asdict(row) for row in catalogue.describe()]
    if as_json:
        print(json.dumps({"sets": rows}, indent=2))
        return
    for row in rows:
        print(f"{row['name']}: {row['kind']}, {row['size']}")
        for title in ("licence", "captions", "split"):
            print(f"  {title}: {row[title].removeprefix('captions: ')}")
        print("  its files are here" if row["installed"] else f"  needs: {row['install']}")


@data.command()
def teach(
    shards: Annotated[str, typer.Argument(help="Folder of shards, tar, glob or URL.", show_default=False)],
    out: Out,
    siglip2: Annotated[str | None, typer.Option(help="Folder of a SigLIP 2; by default EfficientNet-Lite0.")] = None,
    pictures: Annotated[int, typer.Option(help="Frames of a video or views of an asset to look at.", min=1)] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto takes CUDA where there is one.")] = "auto",
    workers: Annotated[
        int | None, typer.Option(help="Processes; by default one for each core, on CUDA one.", min=1)
    ] = None,
    as_json: Json = False,
) -> None:
    """The same shards with what an image network sees in each sample, for models that learn to see it too.

    Training reads it where `loss.imitation` is above 0. A run that was stopped is gone on with.

    \b
    Example:
      atoken demo --out atoken-demo
      atoken shard images atoken-demo --out shards
      atoken data teach shards --out taught
    """
    from data.making.teach import teach as teach_set
    from tokenizer.cli.models import choose_device

    place = choose_device(device)
    many = workers or (1 if place.type == "cuda" else _cores(None))
    made = teach_set(shards, out, siglip2=siglip2, pictures=pictures, device=str(place), workers=many)
    _report(made, out, as_json=as_json)


@data.command()
def show(
    shards: Annotated[str, typer.Argument(help="Folder of shards, tar, glob or URL.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the sheet, the plots and the figures.")] = Path("atoken-data"),
    count: Annotated[int, typer.Option(help="Samples on the contact sheet.", min=1)] = 48,
    seed: Annotated[int, typer.Option(help="Of which samples are shown.")] = 0,
    samples: Annotated[int, typer.Option(help="Samples that the statistics look at, at most.", min=1)] = 10_000,
    as_json: Json = False,
) -> None:
    """A contact sheet with captions, and statistics with plots: sizes, lengths, tokens, captions, labels.

    \b
    Example:
      atoken demo --out atoken-demo
      atoken shard images atoken-demo --out shards
      atoken data show shards --out looks
    """
    from data.show import show as write_show

    report = write_show(shards, out, count=count, seed=seed, limit=samples)
    print(json.dumps(report.as_json(), indent=2) if as_json else report.as_text())


@data.command()
def check(
    shards: Annotated[str, typer.Argument(help="Folder of shards, tar, glob or URL.", show_default=False)],
    as_json: Json = False,
) -> int:
    """Compare shards with the checksums of their manifest.

    \b
    Example:
      atoken demo --out atoken-demo
      atoken shard images atoken-demo --out shards
      atoken data check shards
    """
    from rich.console import Console
    from rich.progress import track

    from data.shards.manifest import read_set, verify

    found = read_set(shards)
    total = len(found.shards)
    wrong = [
        problem for _, problem in track(verify(found), "checking", total=total, console=Console(stderr=True)) if problem
    ]
    if as_json:
        print(json.dumps({"shards": total, "wrong": wrong}, indent=2))
        return 1 if wrong else 0
    for problem in wrong:
        print(problem)
    print(f"{total - len(wrong)} of {total} shards are as their manifest says")
    return 1 if wrong else 0


def tokenize(
    shards: Annotated[str, typer.Argument(help="Folder of shards, tar, glob or URL.", show_default=False)],
    out: Out,
    model: Annotated[str, typer.Option(help="Bundled model, model folder, or released checkpoint.")] = "atoken-nano",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto takes CUDA where there is one.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="auto is bf16 on CUDA and fp32 elsewhere.")] = Dtype.auto,
    discrete: Annotated[bool, typer.Option("--discrete", help="Codebook indices instead of latents.")] = False,
    max_side: Annotated[int, typer.Option(help="Larger pictures and frames are reduced to it.", min=16)] = 256,
    frames: Annotated[int, typer.Option(help="Frames of a video, at most.", min=1)] = 32,
    budget: Annotated[int, typer.Option(help="Tokens encoded together.", min=256)] = 8192,
    workers: Annotated[int, typer.Option(help="Processes that read; 0 reads in this one.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Shards of pictures, videos or assets to shards of latents: mean and log-variance, or indices.

    Under torchrun each process of N takes every Nth shard. A run that was stopped is gone on with; a shard that is
    there is not written again.

    \b
    Examples:
      atoken demo --out atoken-demo
      atoken shard images atoken-demo --out shards
      atoken tokenize shards --out latents
      torchrun --nproc-per-node 8 -m tokenizer.cli tokenize shards --out latents
    """
    from data.latents.tokenize import Settings, tokenize_shards

    settings = Settings(
        model=model,
        device=device,
        dtype=dtype.value,
        discrete=discrete,
        max_side=max_side,
        frames=frames,
        budget=budget,
        workers=workers,
    )
    report = tokenize_shards(shards, out, settings)
    print(json.dumps(report.as_json(), indent=2) if as_json else report.as_text())


def _cores(workers: int | None) -> int:
    return workers or len(os.sched_getaffinity(0))


def _facts_of(made: ShardSet, out: Path) -> dict[str, Any]:
    return {
        "out": str(out),
        "kind": made.kind,
        "shards": len(made.shards),
        "samples": made.samples,
        "bytes": made.bytes,
        "skipped": [{"name": skipped.name, "reason": skipped.reason} for skipped in made.skipped],
    }


def _report(made: ShardSet, out: Path, *, as_json: bool) -> None:
    facts = _facts_of(made, out)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    for skipped in made.skipped[:5]:
        print(f"left out {skipped.name}: {skipped.reason}")
    if len(made.skipped) > 5:
        print(f"left out {len(made.skipped) - 5} more; see {out / 'manifest.json'}")
    print(f"{out}: {made.samples} {made.kind} in {len(made.shards)} shards, {made.bytes / 1e6:.1f} MB")
    if not made.samples:
        raise InputError(f"{out}: nothing could be read")
