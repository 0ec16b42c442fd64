"""The Slurm example, with stand-ins for Slurm's own commands."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "pretrain.sbatch"

# Their words go to a file, since the run's own go to the log.
SRUN = """
all="srun $*"
printf '%s\\n' "${all%%bash*}" >>said
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=9 SLURM_LOCALID=1 SLURM_NTASKS=256 exec "$@"
"""
SCANCEL = 'printf "%s\\n" "scancel $*" >>said; kill -TERM "$(<pid)"'
SCONTROL = 'printf "%s\\n" "scontrol $*" >>said; printf "%s\\n" first second'
PYTHON = """
printf '%s\\n' "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT: $*" >>said
trap 'exit "$(<status)"' TERM
echo $$ >pid
while true; do sleep 0.02; done
"""


def catches(process: int, number: int) -> bool:
    """Whether a process has set a trap for a signal by now."""
    told = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return bool(int(told["SigCgt"], 16) >> (number - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Slurm runs on Linux, which tells who catches what")
@pytest.mark.parametrize(("status", "again"), [(143, True), (0, False)])
def test_a_run_that_is_told_to_stop_is_queued_again_unless_it_is_done(tmp_path: Path, status: int, again: bool) -> None:
    for name, body in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL), ("python", PYTHON)):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "status").write_text(str(status))
    job = {"SLURM_JOB_NODELIST": "first,second", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "12"}
    environment = {**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run = subprocess.Popen(["bash", SCRIPT, "file.yaml", "steps=3"], cwd=tmp_path, env=environment)
    try:
        pid = tmp_path / "pid"
        while not (pid.is_file() and pid.read_text() and catches(run.pid, signal.SIGTERM)):
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=30) == status
    finally:
        run.kill()
    said = (tmp_path / "said").read_text().splitlines()
    assert said[0] == "scontrol show hostnames first,second"
    assert "--cpus-per-task=12" in said[1].split()
    assert said[2] == (
        "9 1 256 first 29500: -m tokenizer.megatron.pretrain --config file.yaml "
        "megatron.use_distributed_optimizer=true steps=3"
    )
    assert said[3:] == ["scancel --signal=TERM 7.0", *(["scontrol requeue 7"] if again else [])]
