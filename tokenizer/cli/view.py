"""`atoken view`: a .ply file of Gaussians becomes a page that shows them."""

from __future__ import annotations

import sys
import warnings
import webbrowser
from pathlib import Path

from tokenizer.cli.jobs import Job, refuse_own_source, refuse_stream
from tokenizer.cli.outcome import Result, run_jobs
from tokenizer.cli.progress import ProgressBars
from tokenizer.errors import InputError

ENDINGS = (".html", ".htm")


def view(source: str, out: str | None, *, max_gaussians: int | None, open_page: bool, as_json: bool) -> int:
    """Write the page of one file and report it.

    Args:
        source: the .ply file.
        out: the page, or a folder for it; without it the page lies beside the source and replaces nothing but pages.
        max_gaussians: of more, the most visible are shown; None for the viewer's default.
        open_page: show it in the browser of this machine.
        as_json: as for `run_jobs`.

    Returns:
        The exit status.
    """
    refuse_stream(Path(source))
    if Path(source).is_dir():
        raise InputError(f"{source}: is a folder; atoken view shows one .ply file")
    job = Job(Path(source), _target(Path(source), out), needs_ending=False)

    def work(job: Job, progress: ProgressBars) -> Result:  # noqa: ARG001
        result = _write(job, max_gaussians)
        if open_page and not webbrowser.open(job.target.resolve().as_uri()):
            result["remarks"].append(f"no browser could be opened; open {job.target} yourself")
        for remark in [] if as_json else result["remarks"]:
            print(f"note: {remark}", file=sys.stderr)
        return result

    return run_jobs("view", [job], work, _viewed, as_json=as_json)


def _target(source: Path, out: str | None) -> Path:
    if out is None:
        beside = source.with_suffix(".html")
        if beside.exists() and not _is_page(beside):
            raise InputError(f"{beside}: exists and is not a page of atoken view; choose another name with --out")
        return beside
    if out.endswith("/") or Path(out).is_dir():
        return Path(out) / f"{source.stem}.html"
    if Path(out).suffix.lower() not in ENDINGS:
        raise InputError(f"--out {out}: pages end in {', '.join(ENDINGS)}; for a folder write {out}/")
    return Path(out)


def _is_page(path: Path) -> bool:
    from tokenizer.viewer.page import MARK

    with path.open("rb") as file:
        return MARK.encode("ascii") in file.read(2048)


def _write(job: Job, max_gaussians: int | None) -> Result:
    from tokenizer.gaussians.ply import PlyWarning, read_ply
    from tokenizer.viewer.page import MAX_GAUSSIANS, write_page

    most = MAX_GAUSSIANS if max_gaussians is None else max_gaussians
    refuse_own_source(job, job.target)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PlyWarning)
        gaussians = read_ply(job.source)
    size = write_page(gaussians, job.target, job.source.name, max_gaussians=most)
    return {
        "out": str(job.target),
        "gaussians": len(gaussians),
        "shown": min(most, len(gaussians)),
        "bytes": size,
        "remarks": [str(one.message) for one in caught if issubclass(one.category, PlyWarning)],
    }


def _viewed(result: Result) -> str:
    cut = f", the {result['shown']} most visible shown" if result["shown"] < result["gaussians"] else ""
    return (
        f"{result['source']} -> {result['out']}: {result['gaussians']} Gaussians{cut}, {result['bytes']} bytes, "
        f"{result['seconds']:.2f} s"
    )
