"""Sweeps of real DVC experiments, on a pipeline of the real one's shape whose stages take no time."""

from __future__ import annotations

import csv
import io
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flows import access, experiments, runtime
from prelar.report.results import Results
from prelar.utils.errors import UserError
from tests.conftest import Project, prefect_home
from tests.flows.toy_pipeline import Toy, make_toy
from tests.serving import until

SWEEP = ("beta_a=0.1,1", "task=reach,dial-turn")
Api = dict[str, str]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """The variables that name one Prefect server for all sweeps here."""
    auth = access.draw()
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as listener:
        home = shutil.copytree(prefect_home(), tmp_path_factory.mktemp("served") / "prefect")
        patch.setenv("PREFECT_HOME", str(home))
        with runtime.started(listener, auth, "server.log", ui=False) as url:
            yield {"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": auth}


def finished(toy: Toy) -> list[str]:
    refs = toy.command("git", "for-each-ref", "--format=%(refname)", "refs/exps").stdout.split()
    return [ref.rsplit("/", 1)[-1] for ref in refs]


def ran(toy: Toy) -> dict[str, int]:
    return {stage: toy.ran(stage) for stage in ("ssv2", "pretrain", "finetune")}


def start(toy: Toy, *words: str, **environment: str) -> subprocess.Popen[bytes]:
    """A sweep in a session of its own, that Ctrl-C reaches also where the tests run in the background."""
    return subprocess.Popen(
        [sys.executable, "-m", "flows.experiments", *words],
        cwd=toy.root,
        env=toy.environment(**environment),
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def assert_untouched(toy: Toy) -> None:
    """The workspace, and what DVC and Git keep of runs, are as if nothing had been started."""
    assert not list((toy.root / ".dvc/tmp").glob("copies/*"))
    for words in (("git", "status", "--porcelain"), ("git", "stash", "list"), ("git", "branch", "--list")):
        assert toy.command(*words).stdout in ("", "* main\n")


@pytest.mark.long
def test_a_sweep_shares_its_pretraining_and_outlives_a_kill(tmp_path: Path, api: Api) -> None:
    toy = make_toy(tmp_path)
    notes = toy.root / "stage.py"
    notes.write_text(notes.read_text(encoding="utf-8") + "# not committed yet\n", encoding="utf-8")
    with start(toy, *SWEEP, TOY_SECONDS="5", **api) as killed:
        until(lambda: toy.ran("pretrain"), "a first pre-training")
        family = psutil.Process(killed.pid).children(recursive=True)
        killed.kill()
    assert not psutil.wait_procs(family, timeout=60)[1], "all that it started ends with it"
    assert toy.ran("ssv2") == 1 and finished(toy) == []
    again = toy.sweep(*SWEEP, check=False, **api)
    assert again.returncode == 0, again.stdout + again.stderr
    assert toy.ran("pretrain-resumed") == toy.ran("pretrain") - 2 > 0, "from the snapshots of what was killed"
    assert (toy.ran("ssv2"), toy.ran("finetune")) == (1, 4)
    assert len(finished(toy)) == 4
    shown = list(csv.DictReader(io.StringIO(toy.command("dvc", "exp", "show", "--csv").stdout)))
    rows = {(row["beta_a"], row["task"]) for row in shown if row["Experiment"] in finished(toy)}
    assert rows == {("0.1", "reach"), ("0.1", "dial-turn"), ("1", "reach"), ("1", "dial-turn")}
    assert not list((toy.root / "data/.resume/experiments").iterdir())
    assert notes.read_text(encoding="utf-8").endswith("# not committed yet\n")
    notes.write_text(notes.read_text(encoding="utf-8"), encoding="utf-8")
    toy.command("git", "commit", "-q", "-a", "-m", "Commit the code")
    (toy.root / "results.md").write_text("as expected", encoding="utf-8")
    toy.command("git", "add", "results.md")
    toy.command("git", "commit", "-q", "-m", "Commit results")
    assert "nothing to do: all 4 experiments have a result" in toy.sweep(*SWEEP).stdout
    assert_untouched(toy)


@pytest.mark.long
def test_what_failed_is_named_with_its_log_and_run_again(tmp_path: Path, api: Api) -> None:
    toy = make_toy(tmp_path)
    broken = toy.sweep("task=reach,dial-turn", "seed=0", check=False, TOY_BROKEN="reach", **api)
    assert broken.returncode == 2 and "Traceback" not in broken.stderr
    (told,) = [line for line in broken.stderr.splitlines() if line.startswith("prelar-ssv2-reach")]
    log = toy.root / told.partition("; ")[2].removesuffix(" has its output")
    assert "broken on purpose" in log.read_text(encoding="utf-8")
    assert "1 of 2 experiments failed (prelar-ssv2-reach" in broken.stderr
    (other,) = finished(toy)
    assert other.startswith("prelar-ssv2-dial-turn") and toy.ran("pretrain") == 1
    assert toy.sweep("task=reach,dial-turn", "seed=0", **api).returncode == 0
    assert toy.ran("pretrain") == 1 and len(finished(toy)) == 2
    lost = toy.sweep("task=reach,dial-turn", "seed=1", check=False, TOY_BROKEN="pretrain", **api)
    assert lost.returncode == 2 and "2 of 2 experiments failed" in lost.stderr
    assert "and 1 more: not started, for pretrain-" in lost.stderr and toy.ran("pretrain") == 2
    assert_untouched(toy)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_an_interrupted_sweep_leaves_no_process_and_no_half_state(
    tmp_path: Path, api: Api, number: int
) -> None:
    toy = make_toy(tmp_path)
    with start(toy, "seed=0,1,2", TOY_SECONDS="60", **api) as interrupted:
        until(lambda: toy.ran("ssv2"), "a stage that runs")
        family = psutil.Process(interrupted.pid).children(recursive=True)
        assert any("stage.py" in process.cmdline() for process in family)
        interrupted.send_signal(number)
        interrupted.wait(timeout=120)
    assert not psutil.wait_procs(family, timeout=60)[1]
    assert finished(toy) == []
    assert_untouched(toy)


@pytest.mark.long
def test_the_code_of_a_tag_runs_whatever_the_workspace_holds(tmp_path: Path, api: Api) -> None:
    toy = make_toy(tmp_path)
    toy.command("git", "tag", "v1")
    assert toy.sweep("--code", "v1", "beta_a=0.1", "task=reach", **api).returncode == 0
    (toy.root / "stage.py").write_text("raise SystemExit('other code')\n", encoding="utf-8")
    toy.command("git", "commit", "-q", "-a", "-m", "Other code")
    assert "nothing to do" in toy.sweep("--code", "v1", "beta_a=0.1", "task=reach").stdout
    assert toy.sweep("--code", "v1", "beta_a=0.1", "task=dial-turn", **api).returncode == 0
    assert ran(toy) == {"ssv2": 1, "pretrain": 1, "finetune": 2}
    assert toy.sweep("beta_a=0.1", check=False, **api).returncode == 2, (
        "it is another experiment, which fails"
    )
    commit = toy.command("git", "rev-parse", "v1").stdout.strip()
    words = ("--code", "v1", "--results", "kept.csv", "beta_a=0.1", "task=reach,dial-turn")
    toy.sweep(*words, **api)
    kept = Results.read(toy.root / "kept.csv")
    assert len(kept.runs) == 2 and kept.commit == commit and not kept.failed
    assert all(run.metrics["success_rate"] == 0.5 for run in kept.runs.values())
    for name in finished(toy):
        toy.command("dvc", "exp", "remove", name)
    before, table = ran(toy), (toy.root / "kept.csv").read_bytes()
    toy.sweep(*words, **api)
    assert ran(toy) == before and (toy.root / "kept.csv").read_bytes() == table, "what has its rows is done"
    toy.sweep(*words[:-1], "task=push", **api)
    more = Results.read(toy.root / "kept.csv")
    assert len(more.runs) == 3 and more.cpu_seconds, "what is new joins the table"
    toy.command("git", "tag", "v2")
    refused = toy.sweep("--code", "v2", *words[2:], check=False, **api)
    assert refused.returncode == 2 and f"go on with `--code {commit[:10]}`" in refused.stderr


def test_a_bad_sweep_ends_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = make_toy(tmp_path)
    monkeypatch.chdir(toy.root)

    def told(*words: str) -> str:
        """What the command prints, in this process."""
        monkeypatch.setattr(sys, "argv", ["flows.experiments", *words])
        experiments.main()
        return capsys.readouterr().out

    refused = toy.sweep("beta_a=-1", check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: params.yaml: beta_a = -1")
    with pytest.raises(UserError, match=r"^code = v9: ") as unknown:
        told("--code", "v9", "seed=1")
    assert "\n" not in str(unknown.value)
    for ended in (
        lambda: told("seed=1", "--results", "kept.csv"),
        lambda: experiments.experiments.fn(results="kept.csv"),
    ):
        with pytest.raises(UserError, match=r"^results: needs code, the tag or commit"):
            ended()
    listed = told("--preset", "demos", "task=reach", "seed=0", "--dry-run").split()
    assert [name.split("-")[0] for name in listed] == ["dreamerv2", "apv", "contextwm", "prelar"]
    assert "192 experiments" in told("--list")
    assert_untouched(toy)


@pytest.mark.long
def test_a_killed_sweep_goes_on_in_the_middle_of_a_stage(
    tmp_path: Path, make_project: Callable[[Path], Project]
) -> None:
    """The real pipeline: pre-training goes on from its snapshot although its copy of the project is gone."""
    project = make_project(tmp_path)
    words = [sys.executable, "-m", "flows.experiments", "beta_a=0.1", "scales.smoke.pretrain.steps=60"]
    words += ["scales.smoke.pretrain.checkpoint_every=5"]
    snapshots = "data/.resume/experiments/*/pretrain-*/step-*.pt"
    with subprocess.Popen(words, cwd=project.root, env=project.environment) as killed:
        until(lambda: list(project.root.glob(snapshots)), "a snapshot", 1200)
        family = psutil.Process(killed.pid).children(recursive=True)
        killed.kill()
    assert not psutil.wait_procs(family, timeout=60)[1]
    project.run(*words, timeout=1800)
    (log,) = project.root.glob("reports/experiments/*.log")
    assert "going on from step" in log.read_text(encoding="utf-8")
    assert "success_rate" in project.run("dvc", "exp", "show", "--csv").stdout
