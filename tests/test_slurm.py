"""The batch script of examples/slurm under Slurm itself: what a signal stopped goes on to the same bytes."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prelar.store.writer import StoreWriter
from tests.conftest import ROOT, Project
from tests.test_pretrain import disc

LACKING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]
CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=1
SlurmctldPort={control}
SlurmdPort={node}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/linear
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """A cluster of this machine; yields the environment in which its commands find it."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = {"control": one.getsockname()[1], "node": other.getsockname()[1]}
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o755)
    key = folder / "munge/key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    conf = folder / "slurm.conf"
    conf.write_text(
        CONF.format(folder=folder, host=socket.gethostname().split(".")[0], cpus=os.cpu_count(), **ports),
        encoding="utf-8",
    )
    places = {name: f"{folder}/munge/{name}" for name in ("socket", "pid", "log", "seed")}
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={places['socket']}"]
    munge += [f"--pid-file={places['pid']}", f"--log-file={places['log']}", f"--seed-file={places['seed']}"]
    commands = [munge, ["slurmctld", "-D", "-f", str(conf)], ["slurmd", "-D", "-f", str(conf)]]
    environment = os.environ | {"SLURM_CONF": str(conf)}
    with contextlib.ExitStack() as stack:
        for command in commands:
            process = stack.enter_context(
                subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
            )
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)
            time.sleep(1)
        yield environment


def until(reached: Callable[[], object], what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.mark.long
@pytest.mark.skipif(bool(LACKING) or os.getuid() != 0, reason="needs Slurm's daemons, and root to start them")
def test_a_run_that_slurm_stopped_goes_on_to_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, make_project: Callable[[Path], Project]
) -> None:
    folder = tmp_path_factory.mktemp("s")
    project = make_project(tmp_path_factory.mktemp("project"))
    (project.root / ".venv").symlink_to(ROOT / ".venv")
    preset = {"steps": 120, "checkpoint_every": 10, "video_every": 120}
    project.edit(threads=1, device="cpu", devices=2, scales={"smoke": {"pretrain": preset}})
    with StoreWriter(project.root / "data/ssv2.zarr") as writer:
        for number in range(12):
            split = "validation" if number % 3 == 0 else "train"
            writer.append(disc(number, 8), {"id": str(number), "split": split, "fps": 12.0})
        writer.finish({"source": {}, "resize": "rule", "ffmpeg": "7"})
    project.run("python", "-m", "prelar", "pretrain")
    made = {path.name: path.read_bytes() for path in (project.root / "data/pretrain").iterdir()}
    shutil.rmtree(project.root / "data/pretrain")

    def ask(*words: str) -> str:
        done: Any = subprocess.run(words, env=environment, cwd=project.root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return str(done.stdout).strip()

    with slurm(folder) as environment:
        environment |= {"PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"}
        until(lambda: "idle" in ask("sinfo", "-h", "-o", "%T"), "an idle node")
        script = ["--gpus-per-node=0", "--cpus-per-task=1", "examples/slurm/pretrain.sbatch"]
        job = ask("sbatch", "--parsable", *script)
        until(lambda: any(project.root.glob("data/.resume/pretrain-*/step-*.pt")), "a snapshot")
        ask("scancel", "--signal=USR1", job)
        log = project.root / f"slurm-prelar-pretrain-{job}.out"
        until(lambda: "going on from step" in log.read_text(encoding="utf-8"), "the second start")
        until((project.root / "data/pretrain/config.json").is_file, "its end")
        until(lambda: not ask("squeue", "-h", "-o", "%T"), "the job's end")
    found = {path.name: path.read_bytes() for path in (project.root / "data/pretrain").iterdir()}
    assert found == made and np.all([len(content) for content in found.values()])
