"""`python -m prelar COMMAND`: the stages of dvc.yaml and further tools."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from prelar import __version__
from prelar.utils.errors import UserError, run_main, shown
from prelar.utils.files import exclusive
from prelar.utils.parents import end_with_dvc

if TYPE_CHECKING:
    from prelar.config import Config

STAGES = {
    "sample": "render the sample archive, packed like Something-Something V2, to data/sample",
    "pretrain": "pre-train the world model of `method` on the store `dataset`, to data/pretrain",
    "finetune": "fine-tune the world model with reinforcement learning on `task`, to data/finetune",
    "evaluate": "evaluate the agent and the world model, to metrics.json and reports/evaluate",
    "simulator": "write the interactive page of the trained models, to reports/simulator.html",
    "report": "write the report of the run in the workspace, to reports/index.html; "
    "with experiments, a comparison of them, to reports/compare.html",
}
WRITES = {
    "sample": "data/sample",
    "pretrain": "data/pretrain",
    "finetune": "data/finetune",
    "evaluate": "reports/evaluate",
    "simulator": "reports/simulator.html",
    "report": "reports/index.html",
}
LONG = ("pretrain", "finetune")
HELPERS = {
    "doctor": "check this machine: packages, ffmpeg, OpenGL, GPU, disk, git, DVC, Prefect, CoppeliaSim",
    "sources": "list the supported sources of videos and demonstrations",
    "check": "validate params.yaml and exit",
    "join": "join the stores of a mixture or a union and validate the result, to data/NAME.zarr",
    "actions": "infer the latent actions of videos or of a store, to a Parquet file",
    "export-lerobot": "export a store as a LeRobotDataset v3.0, optionally with latent actions",
    "play": "serve the interactive page of a trained model to a browser on this machine",
    "record": "record episodes of an agent, or of random actions, to a folder of videos or a store",
    "import-reference": "convert a published checkpoint to data/pretrain, from which fine-tuning starts",
    "push": "upload a checkpoint to the Hugging Face Hub, with a card of its params and metrics",
    "completion": 'print the shell completion of these commands, for eval "$(prelar completion bash)"',
}


def main() -> None:
    """Parse the command line and run one command."""
    end_with_dvc()
    arguments = build_parser().parse_args()
    if arguments.command == "doctor":
        from prelar import doctor

        sys.exit(doctor.run())
    if arguments.command == "sources":
        from prelar.demos import sources

        print(sources.listing())
        return
    if arguments.command == "play":
        run_play(arguments)
        return
    if arguments.command == "push":
        from prelar import push

        push.run(arguments.name, arguments.checkpoint, private=arguments.private, pictures=arguments.pictures)
        return
    if arguments.command == "completion":
        import shtab

        print(shtab.complete(build_parser("prelar"), arguments.shell))
        return
    from prelar.envs.names import checked_config  # not for --help: params take a while to import

    config = checked_config()
    if arguments.command == "check":
        run_check(config)
    elif arguments.command == "join":
        run_join(config, arguments)
    elif arguments.command == "import-reference":
        run_import(config, arguments)
    elif arguments.command == "actions":
        run_actions(config, arguments)
    elif arguments.command == "export-lerobot":
        run_export(config, arguments)
    elif arguments.command == "record":
        run_record(config, arguments)
    elif arguments.command == "report" and arguments.experiments:
        run_comparison(arguments)
    else:
        run_stage(arguments.command, config)


def build_parser(name: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command line, which is called `name`, or as it was started."""
    parser = argparse.ArgumentParser(
        prog=name or ("prelar" if Path(sys.argv[0]).stem == "prelar" else "python -m prelar"),
        description="World models pre-trained on action-free video. Reads params.yaml.",
    )
    parser.add_argument("--version", action="version", version=f"prelar {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {
        name: commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        for name, text in {**STAGES, **HELPERS}.items()
    }
    add_report_arguments(parsers["report"])
    add_join_arguments(parsers["join"])
    add_action_arguments(parsers["actions"])
    add_export_arguments(parsers["export-lerobot"])
    add_record_arguments(parsers["record"])
    add_play_arguments(parsers["play"])
    add_import_arguments(parsers["import-reference"])
    add_push_arguments(parsers["push"])
    parsers["completion"].add_argument("shell", choices=["bash", "zsh"])
    return parser


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of report."""
    parser.add_argument(
        "experiments",
        metavar="EXP",
        nargs="*",
        help="what to compare: experiments (also patterns), branches, tags, commits, `workspace`, "
        "result tables of sweeps (results/NAME.csv)",
    )
    parser.add_argument(
        "--output", type=Path, default=None, help="file of the comparison (default: reports/compare.html)"
    )


def run_comparison(arguments: argparse.Namespace) -> None:
    """Write the page that compares experiments while holding the lock on it."""
    from prelar.report import compare

    output = arguments.output or compare.PAGE
    with exclusive(output):
        compare.run(arguments.experiments, output)


def run_check(config: Config) -> None:
    """Say that params.yaml is valid, and dvc.yaml has the stages that it asks for."""
    from prelar.stages import PIPELINE, Stages

    known = Stages().stages
    if lacking := [name for name in config.mixtures if name not in known]:
        raise UserError(
            f"{PIPELINE}: lacks the stage {lacking[0]}, of that mixture; docs/mixtures.md shows its lines"
        )
    print("params.yaml is valid")


def add_join_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of join."""
    parser.add_argument("name", metavar="NAME", help="mixture or union in params.yaml")
    parser.add_argument(
        "source",
        metavar="SOURCE",
        nargs="?",
        help="source of a mixture: only record which store it is, for DVC",
    )


def run_join(config: Config, arguments: argparse.Namespace) -> None:
    """Join stores while holding the lock on what is written."""
    from prelar import join

    with exclusive(f"data/{arguments.name}.zarr"):
        join.run(config, arguments.name, arguments.source)


def add_action_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of actions."""
    parser.add_argument(
        "sources", metavar="VIDEO", nargs="+", type=Path, help="video files, or one store (a folder ….zarr)"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.parquet")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("data/pretrain"), help="checkpoint (default: data/pretrain)"
    )


def run_actions(config: Config, arguments: argparse.Namespace) -> None:
    """Write latent actions, on the device and with the ffmpeg of params.yaml."""
    from prelar import actions
    from prelar.train.loop import fabric_of

    fabric = fabric_of(config)
    with exclusive(arguments.output):
        actions.run(
            arguments.sources,
            arguments.output,
            checkpoint=arguments.checkpoint,
            device=str(fabric.device),
            ffmpeg=config.ssv2.ffmpeg,
        )


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of export-lerobot."""
    parser.add_argument("store", metavar="STORE", type=Path, help="store, a folder ….zarr")
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of the dataset, to be created")
    parser.add_argument("--checkpoint", type=Path, help="model whose latent actions are added as a feature")
    parser.add_argument("--codec", choices=["av1", "h264"], default="av1", help="video codec (default: av1)")
    parser.add_argument(
        "--fps", type=float, help="if the store has several rates: export the clips of this one"
    )


def run_export(config: Config, arguments: argparse.Namespace) -> None:
    """Write a store as a LeRobotDataset, on the device and with the ffmpeg of params.yaml."""
    from prelar import export_lerobot
    from prelar.train.loop import fabric_of

    fabric = fabric_of(config)
    with exclusive(arguments.folder):
        export_lerobot.run(
            arguments.store,
            arguments.folder,
            checkpoint=arguments.checkpoint,
            codec=arguments.codec,
            fps=arguments.fps,
            device=str(fabric.device),
            ffmpeg=config.ssv2.ffmpeg,
        )


def add_record_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of record."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="fine-tuning checkpoint, such as data/finetune"
    )
    parser.add_argument("folder", metavar="DIR", nargs="?", type=Path, help="folder for the videos")
    parser.add_argument("--store", metavar="NAME", help="write a store, data/NAME.zarr, with the actions")
    parser.add_argument("--episodes", type=int, default=10, help="number of episodes (default: 10)")
    parser.add_argument("--random", action="store_true", help="random actions instead of the agent's")


def run_record(config: Config, arguments: argparse.Namespace) -> None:
    """Record episodes while holding the lock on what is written."""
    from prelar import record
    from prelar.config import STORE_NAME

    if arguments.store and not re.fullmatch(STORE_NAME, arguments.store):
        raise UserError(f"--store {shown(arguments.store)}: use small letters, digits and underscores")
    if arguments.episodes < 1:
        raise UserError(f"--episodes {arguments.episodes}: record 1 or more")
    store = Path(f"data/{arguments.store}.zarr") if arguments.store else None
    with contextlib.ExitStack() as locks:
        for place in filter(None, (arguments.folder, store)):
            locks.enter_context(exclusive(place))
        record.run(
            config,
            arguments.checkpoint,
            arguments.folder,
            store=arguments.store,
            episodes=arguments.episodes,
            random=arguments.random,
        )


def add_play_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of play."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        nargs="?",
        type=Path,
        help="checkpoint (default: data/finetune, else the small trained model that the package ships)",
    )
    parser.add_argument("--port", type=int, default=8390, help="port (default: 8390; 0: any free port)")


def run_play(arguments: argparse.Namespace) -> None:
    """Serve a checkpoint until Ctrl-C, in a project or outside one."""
    from prelar.config import PARAMS
    from prelar.envs.names import checked_config
    from prelar.simulator import demo, play

    config = checked_config() if PARAMS.is_file() else None
    own = demo.FINETUNE if (demo.FINETUNE / "config.json").is_file() else demo.DEMO
    play.run(config, arguments.checkpoint or own, arguments.port)


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of import-reference."""
    parser.add_argument("file", metavar="FILE.pt", type=Path, help="published checkpoint")
    parser.add_argument("--method", required=True, metavar="METHOD", help="its method, as in params.yaml")
    parser.add_argument(
        "--part",
        choices=["encoder", "decoder", "rssm", "action_encoder"],
        help="if the file holds a single part: which; the output folder keeps its other parts",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("data/pretrain"), help="output folder (default: data/pretrain)"
    )


def run_import(config: Config, arguments: argparse.Namespace) -> None:
    """Import a published checkpoint while holding the lock on what it writes."""
    from prelar import import_reference

    with exclusive(arguments.output):
        import_reference.run(
            config,
            arguments.file,
            method=arguments.method,
            part=arguments.part,
            output=arguments.output,
        )


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of push."""
    parser.add_argument("name", metavar="ORG/NAME", help="repository, created if it does not exist")
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        nargs="?",
        type=Path,
        default=Path("data/finetune"),
        help="checkpoint (default: data/finetune)",
    )
    parser.add_argument("--private", action="store_true", help="create the repository as private")
    parser.add_argument(
        "--pictures",
        action="store_true",
        help="also upload images of held-out clips (if their licence allows it); those that the project "
        "rendered are always uploaded",
    )


def run_stage(command: str, config: Config) -> None:
    """Run one stage while holding the lock on what it writes, which of several processes the first one does.

    Threads that wait for work sleep instead of spinning: on a busy machine that is several times faster.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    stage = importlib.import_module(f"prelar.{command}")
    if command in LONG and _is_first():
        importlib.import_module("prelar.doctor").check_stage(command, config)
    with exclusive(WRITES[command]) if _is_first() else contextlib.nullcontext():
        stage.run(config)


def _is_first() -> bool:
    """Whether this is the only process of its run, or the first by the environment that started it."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


def run() -> None:
    """The command `prelar`."""
    run_main(main)


if __name__ == "__main__":
    run()
