"""Fine-tunes a base on a dataset and ends with one table: evaluation loss before and after, and the speed.

Command: python experiments/finetune.py --gin_file experiments/configs/tsldial.gin --gin.DATASET=path/to/tsldial.json
Every config in experiments/configs opens with its claim and its command. Names bound on the command line win.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

import kjax
from kjax import gin_config
from kjax.cli import gin_bindings
from kjax.errors import KjaxError


def arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and NAME=VALUE of each --gin.NAME=VALUE."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gin_file", action="append", required=True, metavar="FILE")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    rest, bindings = gin_bindings(argv)
    return parser.parse_args(rest), bindings


def main() -> int:
    args, bindings = arguments(sys.argv[1:])
    try:
        config = gin_config.load(args.gin_file, bindings)
        run = kjax.train(config, resume=args.resume, overwrite=args.overwrite)
    except KjaxError as error:
        raise SystemExit(f"finetune: {error}") from None
    Console().print(kjax.compare({Path(config.model.directory).name: run}))
    print(run)
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main())
