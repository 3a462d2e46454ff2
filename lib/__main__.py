"""The command line: `python -m lib run | status | models | train`."""

import argparse
import json
import sys
from pathlib import Path

from .paths import REPO
from .pipeline import run
from .planning import DEFAULT_MODEL
from .studies import PROFILES, UserError

EXAMPLES = """examples:
  python -m lib run --profile smoke               every notebook in small, in a few minutes, below runs/smoke/
  python -m lib run --only dose-response -p seed=1 --model ~/models/LLaDA-8B-Instruct --profile paper
"""


def main(arguments: list[str] | None = None, root: Path = REPO) -> int:
    """Exit status: 0 all is well, 1 a notebook failed, 2 the request cannot be carried out, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        match options.command:
            case "models":
                from .families import describe  # loads torch, which takes seconds

                print(describe())
                return 0
            case "card":
                from .cards import write

                for name in options.names:
                    print(write(name))
                return 0
            case "train":
                from .training.command import OUT, measure, train  # loads torch too

                places = dict(corpora=options.corpora, out=options.out or OUT)
                if not options.measure:
                    train(options.name, resume=options.resume, **places)
                print(measure(options.name, **places))
                return 0
            case "status":
                return run(**_selection(options), dry_run=True, root=root)
            case "run":
                selection, jobs = _selection(options), options.jobs
                return run(**selection, jobs=jobs, dry_run=options.dry_run, force=options.force, root=root)
    except (UserError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept, and the same command goes on from there", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EXAMPLES}
    parser = argparse.ArgumentParser(prog="python -m lib", description="Run the notebooks of this study.", **layout)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    runner = commands.add_parser("run", help="run the notebooks that are not up to date", **layout)
    status = commands.add_parser("status", help="show which notebooks are up to date, and why the others are not", **layout)
    commands.add_parser("models", help="show the models that can be named")
    cards = commands.add_parser("card", help="write the numbers of measured.json and of figures/ into shipped models' cards")
    cards.add_argument("names", nargs="+", metavar="NAME", help="smol-mdlm, smol-ar, smol-base")
    trainer = commands.add_parser("train", help="train a shipped model anew (data/training/README.md), then measure it")
    trainer.add_argument("name", help="smol-ar, or smol-mdlm, which grows from it; with --measure smol-base too")
    trainer.add_argument("--corpora", type=Path, metavar="DIR", help="folder of the public corpora (default: $MDLM_CORPORA)")
    trainer.add_argument("--out", type=Path, metavar="DIR", help="where everything goes (default: runs/training)")
    trainer.add_argument("--resume", action="store_true", help="go on from the checkpoint of a run that was stopped")
    trainer.add_argument("--measure", action="store_true", help="only measure: what was trained below --out, else what ships")
    for command in (runner, status):
        command.add_argument("--profile", default="cpu", help=f"how much to measure: {', '.join(PROFILES)} (default: cpu)")
        command.add_argument(
            "--model",
            nargs="+",
            action="extend",
            metavar="NAME|DIR",
            help=f"models to study (default: {DEFAULT_MODEL})",
        )
        command.add_argument("--only", default="", metavar="ID,ID", help="studies to run, as named in notebooks/studies.toml")
        command.add_argument("--out", type=Path, metavar="DIR", help="write figures, results and notebooks below DIR")
        command.add_argument(
            "-p",
            dest="parameters",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="set a parameter (JSON, else a string) in every notebook that has it",
        )
    runner.add_argument("--jobs", type=int, default=1, metavar="N", help="notebooks at a time (default: 1)")
    runner.add_argument("--dry-run", action="store_true", help="only show what would run, and why")
    runner.add_argument("--force", action="store_true", help="run what is up to date too, and measure everything again")
    return parser


def _selection(options: argparse.Namespace) -> dict:
    return {
        "profile": options.profile,
        "models": options.model or [DEFAULT_MODEL],
        "only": [name.strip() for name in options.only.split(",") if name.strip()],
        "out": options.out,
        "parameters": dict(_parameter(text) for text in options.parameters),
    }


def _parameter(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"-p {text}: write -p name=value")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    sys.exit(main())
