"""Megatron's model equals the native one at every layout, in two gloo processes on a CPU."""

from __future__ import annotations

import importlib.util
import os

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None and not os.environ.get("CI"), reason="megatron-core is not installed"
)

# Parameters are float64. Gradients that Megatron's data parallelism collects are float32 (2^-24 = 6e-8 relative).
EXACT, FLOAT32 = 1e-12, 5e-7
LIMITS = {
    "tp weights": 0.0,
    "tp loss": EXACT,
    "tp gradients": EXACT,
    "tp gradient norm": EXACT,
    "padding to 2": EXACT,
    "padding to 16": EXACT,
    "sp loss": EXACT,
    "sp gradients": FLOAT32,
    "recomputed gradients": FLOAT32,
    "pp weights": 0.0,
    "pp losses": EXACT,
    "pp gradients": FLOAT32,
    "dp loss": EXACT,
    "dp gradients": FLOAT32,
    "tp checkpoint at dp": 0.0,
    "tp checkpoint at pp": 0.0,
    "loss after checkpoint": EXACT,
    "state": 0.0,
    # A float32 model, whose gradients differ by rounding before Adam divides by their size.
    "optimizer weights": 1e-4,
    "optimizer resumed at same layout": 0.0,
    "optimizer resumed at tp": 1e-5,
    "distributed optimizer weights": 1e-4,
    "distributed optimizer resumed at same layout": 0.0,
    "distributed optimizer resumed at tp": 1e-5,
    "discrete loss": EXACT,
    "indices": 0.0,
    "engine loss": EXACT,
    "engine gradients": EXACT,
    "local checkpoint in engine": 0.0,
}


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    from tests.tokenizer.megatron_processes import run_checks

    return run_checks(tmp_path_factory.mktemp("megatron"))


@pytest.mark.parametrize("name", LIMITS)
def test_layouts_equal_the_native_model(name: str, differences: dict[str, float]) -> None:
    assert differences[name] <= LIMITS[name]


def test_what_is_wrong_is_said_in_one_line(differences: dict[str, float]) -> None:
    """The checks above ran beside a Transformer Engine that raises on import; it is named to who asks for it."""
    lines = {name: count for name, count in differences.items() if name.endswith("refused")}
    assert lines == dict.fromkeys(("engine refused", "another model refused", "no checkpoint refused"), 1)
    assert differences.keys() - lines.keys() == LIMITS.keys()
