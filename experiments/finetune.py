"""Fine-tunes a base on a dataset and ends with one table: evaluation loss before and after, and the speed.

Command: python experiments/finetune.py --gin_file experiments/configs/tsldial.gin --gin.DATASET=path/to/tsldial.json
Every config in experiments/configs opens with its claim and its command. Names bound on the command line win.
"""

import argparse
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

import kjax
from kjax import gin_config, log
from kjax.config import Config
from kjax.errors import KjaxError
from kjax.run import Run


def arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and NAME=VALUE of each --gin.NAME=VALUE."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gin_file", action="append", required=True, metavar="FILE")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    bindings = [text.removeprefix("--gin.") for text in argv if text.startswith("--gin.")]
    return parser.parse_args([text for text in argv if not text.startswith("--gin.")]), bindings


def throughput(directory: Path) -> float:
    """The median speed of the steps, in real tokens per second; evaluation and compilation are not counted."""
    steps = [entry for entry in log.read(directory / log.LOG) if "step_seconds" in entry]
    totals = [0, *(entry["total_tokens"] for entry in steps)]
    return statistics.median((after - before) / entry["step_seconds"]
                             for before, after, entry in zip(totals, totals[1:], steps, strict=False))


def table(config: Config, run: Run) -> Table:
    """The result of one run."""
    rows = Table(title=f"{', '.join(config.lora.targets)} rank {config.lora.rank}: {Path(config.data.dataset).name}")
    for column in ("base", "steps", "loss, first step", "loss, last step", "eval loss before", "eval loss after",
                   "tokens/s"):
        rows.add_column(column, justify="left" if column == "base" else "right")
    before = run.eval_losses[0] if run.eval_at and run.eval_at[0] == 0 else float("nan")
    after = run.eval_losses[-1] if run.eval_losses else float("nan")
    rows.add_row(Path(config.model.directory).name, str(run.step), f"{run.losses[0]:.3f}", f"{run.losses[-1]:.3f}",
                 f"{before:.4f}", f"{after:.4f}", f"{throughput(run.directory):.0f}")
    return rows


def main() -> int:
    args, bindings = arguments(sys.argv[1:])
    try:
        config = gin_config.load(args.gin_file, bindings)
        run = kjax.train(config, resume=args.resume, overwrite=args.overwrite)
    except KjaxError as error:
        raise SystemExit(f"finetune: {error}") from None
    Console().print(table(config, run))
    print(run)
    return run.exit_code


if __name__ == "__main__":
    sys.exit(main())
