"""The commands of `atoken` and their options. What they do is imported when they run, so that help comes at once."""

from __future__ import annotations

import filecmp
import importlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from tokenizer.atomic import atomic_path
from tokenizer.cli.evaluate import evaluate
from tokenizer.cli.jobs import Job, plan_jobs
from tokenizer.cli.lines import decoded_line, encoded_line, nested_lines, reconstructed_line
from tokenizer.cli.options import (
    DEFAULT_MODEL,
    Device,
    Discrete,
    Dtype,
    ImageFormat,
    Images,
    Inputs,
    Json,
    Model,
    Packed,
    Packing,
    Precision,
    Splats,
    VideoFormat,
    Videos,
)
from tokenizer.cli.outcome import Result, run_jobs
from tokenizer.cli.train import train
from tokenizer.errors import InputError

if TYPE_CHECKING:
    from tokenizer.assets.rules import PackingRule
    from tokenizer.cli.codec import FileCodec
    from tokenizer.cli.progress import ProgressBars

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Pictures, videos and 3D assets to tokens and back.",
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("atoken-demo"),
    model: Model = DEFAULT_MODEL,
    device: Device = "auto",
    dtype: Precision = Dtype.auto,
    discrete: Discrete = False,
    as_json: Json = False,
) -> int:
    """Reconstruct a bundled photograph, a bundled clip and a bundled 3D model.

    The folder gets the originals and, side by side with them, their reconstructions; of the 3D model also its
    Gaussians, which `atoken view` shows. Existing results are replaced; another file by the name of an original is not.

    \b
    Example:
      atoken demo --out atoken-demo
    """
    from tokenizer.demo import ASSET, CLIP, PHOTOGRAPH

    originals = {out / original.name: original for original in (PHOTOGRAPH, CLIP, ASSET)}
    for copy, original in originals.items():
        if copy.exists() and not (copy.is_file() and filecmp.cmp(copy, original, shallow=False)):
            raise InputError(f"{copy}: exists and is not the demo's own; choose another folder with --out")
    codec = _codec(model, device, dtype, discrete=discrete)
    jobs = []
    for (source, original), ending in zip(originals.items(), (".png", ".mp4", ".ply"), strict=True):
        with atomic_path(source) as temporary:
            shutil.copy(original, temporary)
        jobs.append(Job(source, out / f"{original.stem}-side-by-side{ending}", needs_ending=False))
    written: list[str] = []

    def work(job: Job, progress: ProgressBars) -> Result:
        result = codec.reconstruct(job, progress)
        written.extend([str(job.source), *result.get("files", [result["out"]])])
        return result

    status = run_jobs("demo", jobs, work, reconstructed_line, as_json=as_json)
    for path in [] if as_json or status else written:
        print(f"wrote {path}")
    return status


@app.command()
def encode(
    inputs: Inputs,
    out: Annotated[str, typer.Option(help="X.atok for a single file; otherwise a folder.", show_default=False)],
    model: Model = DEFAULT_MODEL,
    device: Device = "auto",
    dtype: Precision = Dtype.auto,
    discrete: Discrete = False,
    gaussians: Splats = None,
    packing: Packed = Packing.auto,
    as_json: Json = False,
) -> int:
    """Pictures, videos and 3D assets to token files (.atok).

    Assets are GLB, glTF, OBJ, PLY, STL and OFF meshes, or a folder of views with a transforms.json.

    A single file, or folder of views, goes to exactly the path given with --out. Several, and folders, go below the
    folder --out, each as its name with the ending .atok; folders keep their tree. Existing files are replaced. Of a
    folder, pictures that an .obj (in its .mtl) or .gltf file names as its textures are left out.

    \b
    Examples:
      atoken demo --out atoken-demo
      atoken encode atoken-demo/coffee.jpg --out coffee.atok
      atoken encode atoken-demo --out tokens
    """
    from tokenizer.cli.inputs import find_inputs
    from tokenizer.tokenfile import SUFFIX

    exact = _names_a_file(out, (SUFFIX,), "token files")
    jobs = plan_jobs(
        inputs,
        Path(out),
        find_inputs,
        exact=exact,
        results=lambda job: [job.target_with(SUFFIX)],
    )
    codec = _codec(model, device, dtype, discrete=discrete, gaussians=gaussians, packing=packing)
    return run_jobs("encode", jobs, codec.encode, encoded_line, as_json=as_json)


@app.command()
def decode(
    inputs: Annotated[list[str], typer.Argument(help="Token files, folders and globs.", metavar="INPUT")],
    out: Annotated[str, typer.Option(help="File for a single input; otherwise a folder.", show_default=False)],
    image_format: Images = ImageFormat.png,
    video_format: Videos = None,
    model: Annotated[str | None, typer.Option(help="As for encode; by default the one that the file names.")] = None,
    device: Device = "auto",
    dtype: Precision = Dtype.auto,
    gaussians: Splats = None,
    original: Annotated[bool, typer.Option("--original", help="3D in the axes and units of the asset's file.")] = False,
    as_json: Json = False,
) -> int:
    """Token files back to pictures, videos and 3D assets.

    A single file goes to exactly the path given with --out, in the format of its ending: .png, .jpg or .webp for
    pictures; .mp4, .webm, .gif or .npy (uint8, T x H x W x 3) for videos, or no ending for a folder of PNG frames;
    .ply for 3D assets, which become Gaussians in the layout that splat viewers read.
    Several, and folders, go below the folder --out; folders keep their tree. Existing files are replaced.

    \b
    Examples:
      atoken demo --out atoken-demo
      atoken encode atoken-demo/bunny.mp4 --out bunny.atok
      atoken decode bunny.atok --out bunny.webm
      atoken decode bunny.atok --out bunny-frames
    """
    exact = _names_a_file(out, _saved_endings(), "results")
    exact = exact or (video_format is None and _is_one_video(inputs))
    jobs = plan_jobs(inputs, Path(out), _find_token_files, exact=exact)
    importlib.import_module("tokenizer.cli.codec")  # seconds long, and no part of the first file's time
    codecs: dict[str, FileCodec] = {}

    def work(job: Job, progress: ProgressBars) -> Result:
        name = model or _maker(job.source)
        if name not in codecs:
            codecs[name] = _codec(
                name,
                device,
                dtype,
                image_format=image_format,
                video_format=video_format,
                gaussians=gaussians,
                original=original,
            )
        return codecs[name].decode(job, progress)

    return run_jobs("decode", jobs, work, decoded_line, as_json=as_json)


@app.command()
def reconstruct(
    inputs: Inputs,
    out: Annotated[str, typer.Option(help="File for a single input; otherwise a folder.")] = "reconstructions",
    image_format: Images = ImageFormat.png,
    video_format: Videos = None,
    model: Model = DEFAULT_MODEL,
    device: Device = "auto",
    dtype: Precision = Dtype.auto,
    discrete: Discrete = False,
    gaussians: Splats = None,
    packing: Packed = Packing.auto,
    as_json: Json = False,
) -> int:
    """Originals and reconstructions side by side, and how close they are.

    Prints tokens, bits per pixel (the latents as stored, or 96 bits a token for 8 codebooks of 4096; per pixel of
    every frame), PSNR in dB and SSIM on 8-bit RGB, and seconds. SSIM has the uniform window of 7x7 pixels; that of
    `atoken evaluate` has the Gaussian one of its paper, so it is another figure. PSNR is of all frames or views
    together; that of `atoken evaluate` is the mean of theirs.

    A 3D asset becomes three files: Gaussians (NAME.ply), a contact sheet (NAME-sheet.png) and a turntable clip
    (NAME-turntable.mp4), the latter two with the original beside them. Its figures are of eight views that the model
    has not seen, on black.

    Names are as for encode. Existing files are replaced, but never an input of the same command.

    \b
    Examples:
      atoken demo --out atoken-demo
      atoken reconstruct atoken-demo/coffee.jpg --out coffee.png
      atoken reconstruct "atoken-demo/*.jpg" --out reconstructions
      atoken reconstruct atoken-demo/bread.glb --out bread.ply
    """
    from tokenizer.cli.codec import reconstructed_files
    from tokenizer.cli.inputs import find_inputs

    exact = _names_a_file(out, _saved_endings(), "results")
    endings = f".{image_format}", _video_ending(video_format)
    jobs = plan_jobs(
        inputs, Path(out), find_inputs, exact=exact, results=lambda job: reconstructed_files(job, *endings)
    )
    codec = _codec(
        model,
        device,
        dtype,
        discrete=discrete,
        image_format=image_format,
        video_format=video_format,
        gaussians=gaussians,
        packing=packing,
    )
    return run_jobs("reconstruct", jobs, codec.reconstruct, reconstructed_line, as_json=as_json)


@app.command()
def view(
    source: Annotated[str, typer.Argument(help="Gaussians in a .ply file.", metavar="FILE", show_default=False)],
    out: Annotated[str | None, typer.Option(help="The page, or a folder for it; by default beside the file.")] = None,
    max_gaussians: Annotated[int | None, typer.Option(help="Of more, show the most visible.", min=1)] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Show it in the browser of this machine.")] = False,
    as_json: Json = False,
) -> int:
    """Gaussians as a page that any browser shows: one HTML file, nothing from a network.

    \b
    Examples:
      atoken demo --out atoken-demo
      atoken view atoken-demo/bread-side-by-side.ply --out bread.html
    """
    from tokenizer.cli.view import view as write_view

    return write_view(source, out, max_gaussians=max_gaussians, open_page=open_page, as_json=as_json)


app.command()(evaluate)
app.command()(train)


@app.command()
def info(
    model: Annotated[str | None, typer.Option(help="Describe this model too.")] = None,
    device: Device = "auto",
    dtype: Precision = Dtype.auto,
    as_json: Json = False,
) -> None:
    """Versions, devices, the attention kernel in use, and what a model is.

    \b
    Example:
      atoken info --model atoken-nano
    """
    from tokenizer.cli.models import choose_device, choose_dtype, describe_machine, describe_model, load_model

    place = choose_device(device)
    facts: dict[str, Any] = describe_machine(place, choose_dtype(dtype, place))
    if model is not None:
        facts["model"] = describe_model(load_model(model, device, dtype, discrete=False))
    print(json.dumps(facts, indent=2) if as_json else "\n".join(nested_lines(facts)))


@app.command()
def models(as_json: Json = False) -> None:
    """The models that come with this package.

    \b
    Example:
      atoken models
    """
    from tokenizer.cli.models import describe_models

    found = describe_models()
    if as_json:
        print(json.dumps({"models": found}, indent=2))
    for entry in [] if as_json else found:
        print(
            f"{entry['name']}: {entry['latents']} for each patch of {entry['patch']}, "
            f"{entry['parameters'] / 1e6:.1f} M parameters, {entry['megabytes']} MB"
        )
    if not found and not as_json:
        print("no bundled models; give --model a folder or a released checkpoint")


def _codec(
    model: str,
    device: str,
    dtype: Dtype,
    *,
    discrete: bool = False,
    image_format: ImageFormat = ImageFormat.png,
    video_format: VideoFormat | None = None,
    gaussians: Path | None = None,
    packing: Packing = Packing.auto,
    original: bool = False,
) -> FileCodec:
    from tokenizer.cli.codec import FileCodec
    from tokenizer.cli.models import load_model

    loaded = load_model(model, device, dtype, discrete=discrete)
    if gaussians is not None:
        loaded.load_gaussian_decoder(gaussians, dtype=loaded.dtype)
    rule = None if packing is Packing.auto else cast("PackingRule", packing.value)
    return FileCodec(loaded, f".{image_format}", _video_ending(video_format), rule, original=original)


def _video_ending(video_format: VideoFormat | None) -> str:
    return "" if video_format is VideoFormat.frames else f".{video_format or VideoFormat.mp4}"


def _saved_endings() -> tuple[str, ...]:
    """Endings of everything that decode and reconstruct write."""
    from tokenizer.media import SAVED_IMAGE_ENDINGS, SAVED_VIDEO_ENDINGS

    return (*SAVED_IMAGE_ENDINGS, *SAVED_VIDEO_ENDINGS, ".ply")


def _names_a_file(out: str, endings: Sequence[str], what: str) -> bool:
    """Whether --out is the result itself and not a folder. Only a folder that exists, or `x.y/`, may have an ending."""
    path = Path(out)
    if out.endswith("/") or path.is_dir() or not path.suffix:
        return False
    if path.suffix.lower() not in endings:
        raise InputError(f"--out {out}: {what} end in {', '.join(endings)}; for a folder write {out}/")
    return True


def _is_one_video(inputs: Sequence[str]) -> bool:
    from tokenizer.tokenfile import TokenReader

    if len(inputs) != 1 or not Path(inputs[0]).is_file():
        return False
    try:
        return TokenReader(inputs[0]).origin.sizes[0].kind == "video"
    except InputError:  # reported when it is its turn
        return False


def _maker(path: Path) -> str:
    """The bundled model that made a token file."""
    from tokenizer.checkpoints import bundled_models
    from tokenizer.tokenfile import TokenReader

    name = TokenReader(path).origin.model
    if name not in bundled_models():
        raise InputError(f"{path}: was made by '{name}', which is not bundled; say where it is with --model")
    return name


def _find_token_files(folder: Path) -> list[Path]:
    from tokenizer.tokenfile import SUFFIX

    found = sorted(
        path
        for path in folder.rglob(f"*{SUFFIX}")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise InputError(f"{folder}: no {SUFFIX} files in it")
    return found
