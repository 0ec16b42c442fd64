"""Model files: exact both ways in every precision, little memory to load, and one line for every broken one."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tokenizer.networks import small_config
from tokenizer import AToken, ATokenConfig, checkpoints
from tokenizer.config import config_to_dict
from tokenizer.errors import InputError
from tokenizer.model.config import BASE, FSQConfig, SkipConfig
from tokenizer.released import config_to_released, rename_to_released

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "continuous": small_config(),
    "discrete": small_config(discrete=True),
    "piecewise": replace(small_config(), skip=SkipConfig(still_codes=3, clip_codes=2)),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)


def random_model(config: ATokenConfig, dtype: torch.dtype = torch.float32) -> AToken:
    """Every parameter and buffer random."""
    model = AToken(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model.to(dtype)


def same_bytes(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(InputError) as error:
        action()
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 600  # bad keys are listed, not dumped
    return text


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Writing fails after `room` bytes of a file, as on a full disk. Needs no rights."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------- our own folders


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_folder_gives_back_the_same_bits(tmp_path: Path, config: ATokenConfig, dtype: torch.dtype) -> None:
    model = random_model(config, dtype)
    model.save_pretrained(tmp_path / "model")
    loaded = AToken.from_pretrained(tmp_path / "model")
    assert loaded.config == config
    assert same_bytes(loaded.state_dict(), model.state_dict())
    assert {name for name, _ in loaded.named_buffers()} == {name for name, _ in model.named_buffers()}
    assert loaded.fingerprint == model.fingerprint
    assert not loaded.training
    assert sorted(contents(tmp_path)) == ["model/config.json", "model/model.safetensors"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_precision_changes_on_the_way_out_or_in(tmp_path: Path, dtype: torch.dtype) -> None:
    model = random_model(CONFIGS["piecewise"])
    wanted = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "out", dtype=dtype)
    model.save_pretrained(tmp_path / "in")
    assert same_bytes(AToken.from_pretrained(tmp_path / "out").state_dict(), wanted)
    assert same_bytes(AToken.from_pretrained(tmp_path / "in", dtype=dtype).state_dict(), wanted)
    assert model.dtype == torch.float32


def test_weights_cannot_be_integers(tmp_path: Path) -> None:
    random_model(CONFIGS["piecewise"]).save_pretrained(tmp_path)
    assert refused(lambda: AToken.from_pretrained(tmp_path, dtype=torch.int8)) == (
        "weights are floats and cannot be int8; use torch.bfloat16"
    )


def test_a_loaded_model_is_independent_of_its_file(tmp_path: Path) -> None:
    model = random_model(CONFIGS["continuous"])
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    loaded = AToken.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        loaded.encoder.to_posterior.weight.add_(1)
    assert contents(tmp_path) == before
    other = AToken.from_pretrained(tmp_path, dtype=torch.float32)
    (tmp_path / "model.safetensors").write_bytes(b"")  # in place, under its feet
    assert same_bytes(other.state_dict(), model.state_dict())


def test_saving_keeps_other_files_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("a card")
    for name in ("continuous", "discrete"):
        random_model(CONFIGS[name]).save_pretrained(tmp_path)
        assert AToken.from_pretrained(tmp_path).config == CONFIGS[name]
    assert sorted(contents(tmp_path)) == ["README.md", "config.json", "model.safetensors"]


# ---------------------------------------------------------------------- released files


@functools.cache
def released(golden: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    configs = json.loads((golden / "README.json").read_text())["configs"]
    return configs["soc"], load_file(golden / "state_soc.safetensors")


def write_released(golden: Path, path: Path, configuration: str | None = None) -> Path:
    """The recorded checkpoint as published, with the parameters of the training loss, its configuration beside it."""
    config, state = released(golden)
    state = {**state, "lpips_loss.net.0.weight": torch.ones(3), "lpips_loss.lins.0": torch.ones(2)}
    if path.suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    if configuration is not None:
        text = json.dumps(config) if configuration.endswith("json") else yaml.safe_dump(config)
        path.with_name(configuration).write_text(text)
    return path


@pytest.mark.parametrize("beside", ["soc.yaml", "soc.yml", "soc.json", "config.yaml", "config.json"])
@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_released_files_come_back_byte_for_byte(golden: Path, tmp_path: Path, ending: str, beside: str) -> None:
    config, state = released(golden)
    model = AToken.from_pretrained(write_released(golden, tmp_path / f"soc{ending}", beside))
    for copy_ending in (".pt", ".safetensors"):
        model.export_released(tmp_path / "copy" / f"copy{copy_ending}")
        written = tmp_path / "copy" / f"copy{copy_ending}"
        read = torch.load(written, weights_only=True) if copy_ending == ".pt" else load_file(written)
        assert same_bytes(read, state)
        assert written.stat().st_size < 1.1 * sum(tensor.nbytes for tensor in state.values())
        assert same_bytes(AToken.from_pretrained(written).state_dict(), model.state_dict())
    assert json.loads((tmp_path / "copy" / "copy.json").read_text()) == config
    from_memory = AToken.from_released(config, {**state, "lpips_loss.x": torch.ones(1)})
    assert same_bytes(from_memory.state_dict(), model.state_dict())
    assert from_memory.fingerprint == model.fingerprint


def test_weights_given_in_memory_are_copied(golden: Path) -> None:
    config, state = released(golden)
    own = {name: tensor.clone() for name, tensor in state.items()}
    for dtype in (None, torch.float32):
        model = AToken.from_released(config, own, dtype=dtype)
        with torch.no_grad():
            model.encoder.to_posterior.weight.zero_()
    assert same_bytes(own, state)


def test_a_configuration_can_be_given_instead(golden: Path, tmp_path: Path) -> None:
    config, _ = released(golden)
    path = write_released(golden, tmp_path / "soc.pt")
    assert "no configuration beside it" in refused(lambda: AToken.from_pretrained(path))
    assert "put the released configuration there as soc.yaml" in refused(lambda: AToken.from_pretrained(path))
    given = AToken.from_released(config, released(golden)[1]).config
    assert AToken.from_pretrained(path, config=given).config == given


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_num_block": 2}, "unknown key 'encoder_num_block' in the released configuration; did you mean"),
        ({"encoder_num_blocks": "2"}, 'encoder_num_blocks must be like 27, got "2"'),
        ({"use_decoder": 1}, "use_decoder must be like true, got 1"),
        ({"patch_size": [4, 16]}, "patch_size must have three numbers"),
        ({"patch_size": [4, 16, "16"]}, "patch_size must have three numbers"),
        ({"patch_size": [4, 8, 8]}, "in_channels 3072 does not fit patch_size [4, 8, 8], which has 768 features"),
        ({"encoder_pe_mode": "ape"}, "encoder_pe_mode 'ape' is not supported; use one of joint, learned, rope"),
        ({"decoder_attn_mode": "swin"}, "decoder_attn_mode 'swin' is not supported"),
        ({"use_quantizer": True, "quantizer_type": "lfq"}, "quantizer_type 'lfq' is not supported"),
    ],
)
def test_odd_released_configurations(golden: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_released(golden, tmp_path / "soc.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**released(golden)[0], **change}))
    text = refused(lambda: AToken.from_pretrained(path))
    assert text.startswith(f"{tmp_path / 'config.json'}: ")
    assert message in text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIGS["piecewise"], "has a linear code beside the transformers"),
        (replace(small_config(), tile_frames=8), "has tiles of 8 frames"),
        (
            replace(small_config(), encoder=replace(small_config().encoder, learned_positions=False, rotary=False)),
            "the encoder has no positions at all",
        ),
    ],
)
def test_what_the_released_format_cannot_say_is_not_exported(
    tmp_path: Path, config: ATokenConfig, message: str
) -> None:
    assert message in refused(lambda: AToken(config).export_released(tmp_path / "x.pt"))
    assert "end in .safetensors or .pt" in refused(lambda: AToken(small_config()).export_released(tmp_path / "x.bin"))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- keys that do not fit


def test_bad_keys_are_listed_a_few_of_each(golden: Path) -> None:
    config, state = released(golden)
    load = AToken.from_released
    fits = "the state dict: does not fit the configuration 'atoken-w64-c': keys "
    assert refused(lambda: load(config, {k: v for k, v in state.items() if k != "proj.weight"})) == (
        f"{fits}1 missing (proj.weight)"
    )
    extra = {f"head.{i}": torch.ones(1) for i in range(100)}
    assert refused(lambda: load(config, {**state, **extra})) == f"{fits}100 unexpected (head.0, head.1, head.10, ...)"
    assert refused(lambda: load(config, {**state, "proj.weight": torch.ones(3, 4)})) == (
        f"{fits}1 of another shape (proj.weight is [3, 4], not [96, 64])"
    )
    deeper = {**config, "encoder_num_blocks": 3}
    text = refused(lambda: load(deeper, state))
    assert re.search(r"\d+ missing \(encoder\.blocks\.2\.\S+, encoder\.blocks\.2\.\S+, encoder\.blocks\.2\.\S+, ", text)
    integers = {**state, "proj.weight": torch.ones(96, 64, dtype=torch.int32)}
    assert refused(lambda: load(config, integers)) == "the state dict: proj.weight is int32; weights must be floats"


# ---------------------------------------------------------------------- broken files


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.0005, 0.5, 0.999])
def test_truncated_files(golden: Path, tmp_path: Path, ending: str, share: float) -> None:
    path = write_released(golden, tmp_path / f"soc{ending}", "soc.json")
    cut(path, share)
    text = refused(lambda: AToken.from_pretrained(path))
    assert text.startswith(f"{path}: ")
    assert "not a readable" in text or "damaged" in text


@pytest.mark.parametrize("old_format", [False, True])
def test_code_in_a_pickle_is_never_run(golden: Path, tmp_path: Path, old_format: bool) -> None:
    path, marker = tmp_path / "soc.pt", tmp_path / "ran"
    state = {**released(golden)[1], "proj.weight": Trap(marker)}
    torch.save(state, path, _use_new_zipfile_serialization=not old_format)
    assert str(path) in refused(lambda: AToken.from_pretrained(path))
    path.write_bytes(pickle.dumps({"proj.weight": Trap(marker)}))
    assert str(path) in refused(lambda: AToken.from_pretrained(path))
    assert not marker.exists()


@pytest.mark.parametrize(
    "value", [[torch.ones(1)], {"model": {"proj.weight": torch.ones(1)}}, {3: torch.ones(1)}, torch.ones(1)]
)
def test_a_pt_file_of_something_else(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "x.pt")
    assert "must hold a bare state dict" in refused(lambda: AToken.from_pretrained(tmp_path / "x.pt"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_half_a_folder(tmp_path: Path, name: str) -> None:
    random_model(CONFIGS["continuous"]).save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    assert refused(lambda: AToken.from_pretrained(tmp_path)) == f"{tmp_path}: not a model folder, {name} is missing"


@pytest.mark.usefixtures("bundled")
def test_an_unknown_name_lists_the_bundled_models() -> None:
    assert refused(lambda: AToken.from_pretrained("atoken-nanno")) == (
        "no model 'atoken-nanno': not a file or folder, and the bundled models are atoken-nano, atoken-nano-d"
    )
    assert AToken.from_pretrained("atoken-nano-d").quantizer is not None


def test_no_bundled_models_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "PRETRAINED", tmp_path / "missing")
    assert "the bundled models are none" in refused(lambda: AToken.from_pretrained("atoken-nano"))


# ---------------------------------------------------------------------- a full disk

SAVES: dict[str, Callable[[AToken, Path], None]] = {
    "new folder": lambda model, folder: model.save_pretrained(folder / "new"),
    "old folder": lambda model, folder: model.save_pretrained(folder),
    "export pt": lambda model, folder: model.export_released(folder / "old.pt"),
    "export safetensors": lambda model, folder: model.export_released(folder / "old.safetensors"),
}


@pytest.mark.parametrize("room", [0, 300, 5000])  # nothing, half a configuration, half the weights
@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES.keys())
def test_a_full_disk_leaves_everything_as_it_was(
    tmp_path: Path, save: Callable[[AToken, Path], None], room: int
) -> None:
    old, new = random_model(CONFIGS["continuous"]), random_model(CONFIGS["discrete"], torch.float16)
    for write in SAVES.values():
        write(old, tmp_path)
    shutil.rmtree(tmp_path / "new")
    before = contents(tmp_path)
    with full_disk(room), pytest.raises(OSError, match="File too large") as error:
        save(new, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert contents(tmp_path) == before
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


# ---------------------------------------------------------------------- the name of a latent space


def test_the_fingerprint_is_that_of_the_weights_in_any_precision(tmp_path: Path) -> None:
    model = random_model(CONFIGS["continuous"])
    name = model.fingerprint
    for dtype in DTYPES:
        model.save_pretrained(tmp_path / str(dtype), dtype=dtype)
        assert AToken.from_pretrained(tmp_path / str(dtype)).fingerprint == name
        narrow = AToken.from_pretrained(tmp_path / "torch.float32", dtype=dtype)
        assert narrow.fingerprint == name
        assert copy.deepcopy(narrow).fingerprint == name
        narrow.save_pretrained(tmp_path / "again")
        assert AToken.from_pretrained(tmp_path / "again").fingerprint == name
    assert AToken.from_pretrained(tmp_path / "torch.float32").to(torch.float16).fingerprint == name


def test_another_model_has_another_fingerprint(tmp_path: Path) -> None:
    model = random_model(CONFIGS["continuous"])
    names = {model.fingerprint}
    with torch.no_grad():
        model.encoder.to_posterior.weight.mul_(1.01)  # after the name was asked for
        names.add(model.fingerprint)
        model.load_state_dict({name: tensor * 1.01 for name, tensor in model.state_dict().items()})
        names.add(model.fingerprint)
    for quantizer in (FSQConfig(codebooks=2), FSQConfig(codebooks=6, codebook_size=64)):
        other = AToken(replace(model.config, quantizer=quantizer))
        other.load_state_dict(model.state_dict())
        names.add(other.fingerprint)
    # Whoever changes weights with other tools and copies the metadata makes another model all the same.
    model.save_pretrained(tmp_path)
    state, weights = load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors"
    opener: Any = safe_open
    metadata = opener(str(weights), framework="pt").metadata()
    save_file({name: tensor + 1 for name, tensor in state.items()}, weights, metadata=metadata)
    names.add(AToken.from_pretrained(tmp_path).fingerprint)
    assert len(names) == 6
    renamed = AToken(replace(model.config, name="other"))
    renamed.load_state_dict(model.state_dict())
    assert renamed.fingerprint == model.fingerprint


# ---------------------------------------------------------------------- memory

LOAD = """
import json, sys, threading, time
import psutil
from tokenizer import AToken, checkpoints

def peak_over_size(path, dtype):
    process, peak, done = psutil.Process(), 0, False
    def watch():
        nonlocal peak
        while not done:
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.002)
    before = process.memory_info().rss
    thread = threading.Thread(target=watch)
    thread.start()
    model = AToken.from_pretrained(path, dtype=checkpoints.DTYPES[dtype])
    done = True
    thread.join()
    return (peak - before) / sum(tensor.nbytes for tensor in model.state_dict().values())

print(json.dumps([peak_over_size(sys.argv[1] + path, dtype) for path, dtype in json.loads(sys.argv[2])]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of the base size in bfloat16 (365 MB), ours and as a released .pt."""
    folder = tmp_path_factory.mktemp("large")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AToken(BASE).state_dict().items()}
    state = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_to_dict(BASE)))
    torch.save({rename_to_released(name): tensor for name, tensor in state.items()}, folder / "base.pt")
    (folder / "base.json").write_text(json.dumps(config_to_released(BASE)))
    return folder


def test_loading_needs_hardly_more_than_the_result(large: Path) -> None:
    cases = [("/", "bf16"), ("/", "fp32"), ("/base.pt", "bf16"), ("/base.pt", "fp16")]
    command = [sys.executable, "-c", LOAD, str(large), json.dumps(cases)]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    peaks = dict(zip(cases, json.loads(result.stdout), strict=True))
    assert all(peak < 1.4 for peak in peaks.values()), peaks
    # The measure works; a later case may reuse what the system has not yet taken back from an earlier one.
    assert max(peaks.values()) > 0.5, peaks
