"""Furniture as shards: the models of `data.sources.furniture` as voxels and views, rendered once.

The voxels are packed from the seen views by the rule "surface"; seen and unseen views are kept for losses and measures.
Views come from a store that `python -m data.sources.furniture` made, where one is given, and are rendered otherwise;
the same renderer gives the same bytes both ways.

A second set, `interiors`, holds the models that the program itself brings: few and plain, with the same categories, so
that a model that is to know them has seen what is most typical of each.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data.decode.assets import encode_asset_files
from data.shards.manifest import Skipped
from data.shards.writer import Record
from data.sources.furniture import Model, catalogue, program_catalogue, read_views, render, stored_models
from data.sources.packages import FURNITURE, PROGRAM
from data.sources.sets import OpenSet, Options, Plan, Split, mixed, record, slug
from tokenizer.assets.packing import pack
from tokenizer.assets.rules import PackingRule
from tokenizer.errors import InputError

RULE: PackingRule = "surface"
PER_SHARD = 48


@dataclass(frozen=True, slots=True)
class _Job:
    """One model; number: among all, which turns the unseen cameras where it is rendered; file: in a store; source: the
    package that it is of."""

    model: Model
    number: int
    file: Path | None
    resolution: int
    source: str = FURNITURE.name


def _make(job: _Job) -> Iterator[Record | Skipped]:
    model = job.model
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # degenerate faces and the like, of which these models have many
            seen, unseen = render(model, job.number) if job.file is None else read_views(job.file)
        seen = replace(seen, depth=seen.depth.half().float())  # as a store keeps it
        voxels = pack(seen, RULE, job.resolution)
    except InputError as error:
        yield Skipped(f"{Path(model.archive).name}, model {model.number}", str(error))
        return
    files, facts = encode_asset_files(voxels.features, voxels.coordinates, job.resolution, RULE, seen, unseen)
    caption = ", ".join(filter(None, [model.name.lower(), model.category.lower()]))
    told = {"label": model.category.lower(), "name": model.name, "licence": model.licence, "creator": model.creator}
    key = slug(Path(model.file).stem)
    yield record(key, files, caption, **facts, **told, source=job.source, catalogue=Path(model.archive).name)


def _plan(options: Options) -> Plan:
    if options.source is None:
        SET.require()
        models = catalogue()
    else:
        models = stored_models(options.source)
    jobs: dict[Split, list[_Job]] = {"train": [], "evaluation": []}
    for number, model in enumerate(models):
        file = None if options.source is None else options.source / model.file
        split: Split = "evaluation" if model.split == "evaluation" else "train"
        jobs[split].append(_Job(model, number, file, options.resolution))
    return _plan_of(jobs, options)


def _plan_of(jobs: dict[Split, list[_Job]], options: Options) -> Plan:
    labels = sorted({job.model.category.lower() for entries in jobs.values() for job in entries} - {""})
    chosen = {split: mixed(entries, options) for split, entries in jobs.items()}
    return Plan(chosen, _make, PER_SHARD, labels, {"rule": RULE, "resolution": options.resolution})


SET = OpenSet(
    name="furniture",
    kind="assets",
    size="820 models with 24 views each, 1.4 GB",
    licence="CC0 (175 models) and CC-BY-3.0 (645), per model",
    citation="models of the Sweet Home 3D furniture libraries by their creators, see the facts of each sample",
    packages=(FURNITURE,),
    captions="captions: name and category; labels: categories",
    split="models whose number in their catalogue is divisible by 10 are for evaluation",
    plan=_plan,
    takes_source="a store of python -m data.sources.furniture",
)


def _plan_interiors(options: Options) -> Plan:
    if options.source is None:
        INTERIORS.require()
    archives = [options.source] if options.source else [f for f in PROGRAM.files() or [] if f.name == "sweethome3d.jar"]
    if not archives:
        raise InputError(f"the package {PROGRAM.name} is installed without sweethome3d.jar; install it again")
    models = program_catalogue(archives[0])
    jobs = [_Job(model, number, None, options.resolution, PROGRAM.name) for number, model in enumerate(models)]
    return _plan_of({"train": jobs}, options)


INTERIORS = OpenSet(
    name="interiors",
    kind="assets",
    size="92 models with 24 views each, 175 MB",
    licence="GPL-2+; train on it, redistribute none of it",
    citation="models of Sweet Home 3D by eTeks and others",
    packages=(PROGRAM,),
    captions="captions: name and category; labels: categories, those of the set 'furniture'",
    split="all for training",
    plan=_plan_interiors,
    takes_source="sweethome3d.jar",
)
