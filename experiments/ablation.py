"""Trains one run for each combination of settings, and puts them side by side in one table and one picture.

Command: python experiments/ablation.py --gin_file experiments/configs/demo.gin --gin.RUN_DIR=runs/ranks \\
  --over "Lora.rank=[2, 8, 32]" --over "Train.seed=[0, 1]"
Settings that go together: --over "Lora.rank,Lora.alpha=[(2, 4.0), (8, 16.0)]". Runs that differ in their seed alone are
repeats. Each run has a directory of its own in Train.run_dir. The same command goes on where it was stopped.
"""

import argparse
import dataclasses
import itertools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

import kjax
from kjax import gin_config, gin_reader
from kjax.checkpoint import Checkpoints
from kjax.cli import gin_bindings
from kjax.config import Config
from kjax.errors import ConfigError, KjaxError, RunError
from kjax.run import Run
from kjax.run_directory import CONFIG, LOCK, SAVED


@dataclass(frozen=True)
class Axis:
    """Settings that are varied together, and what they are set to."""

    names: tuple[str, ...]
    choices: tuple[tuple, ...]

    @property
    def repeats(self) -> bool:
        """Whether it varies nothing but the seed."""
        return all(name.rpartition(".")[2].lower() == "seed" for name in self.names)


def axis(text: str) -> Axis:
    """NAME=[VALUE, ...], or NAME,NAME=[(VALUE, VALUE), ...]."""
    left, equals, right = text.partition("=")
    names = tuple(name.strip() for name in left.split(","))
    form = "write NAME=[VALUE, ...], or NAME,NAME=[(VALUE, VALUE), ...]"
    try:
        values = gin_reader.parse_value(right)
    except SyntaxError:
        values = None
    if not equals or not isinstance(values, (list, tuple)) or not values or any(gin_reader.macro_names(values)):
        raise ConfigError(f"--over {text}: no list of values; {form}")
    choices = tuple((value,) if len(names) == 1 else value for value in values)
    for choice in choices:
        if not isinstance(choice, (list, tuple)) or len(choice) != len(names):
            raise ConfigError(f"--over {text}: {choice!r} is not {len(names)} values; {form}")
    return Axis(names, choices)


@dataclass(frozen=True)
class Variant:
    """One run: the row of the table that it belongs to, and its settings."""

    row: str
    config: Config


def variants(files: list[str], bindings: list[str], axes: list[Axis]) -> list[Variant]:
    """Every combination, the last --over varying fastest; raises ConfigError for what is wrong with any of them."""
    names = [name for axis in axes for name in axis.names]
    last = [name.rpartition(".")[2] for name in names]
    short = dict(zip(names, last if len(set(last)) == len(last) else names, strict=True))
    made: dict[str, Variant] = {}
    for chosen in itertools.product(*(axis.choices for axis in axes)):
        bound, row = {}, []
        for axis, values in zip(axes, chosen, strict=True):
            bound |= dict(zip(axis.names, values, strict=True))
            if not axis.repeats:
                row += axis.names
        config = gin_config.load(files, [*bindings, *(f"{name}={value!r}" for name, value in bound.items())])
        texts = {name: f"{short[name]} {_plain(value)}" for name, value in bound.items()}
        directory = re.sub(r"[^\w.+-]+", "_", "_".join(texts.values()))
        if directory in made:
            raise ConfigError(f"--over: two combinations would share the directory {directory}; is one given twice?")
        train = dataclasses.replace(config.train, run_dir=str(Path(config.train.run_dir) / directory))
        made[directory] = Variant(", ".join(texts[name] for name in row) or "all",
                                  dataclasses.replace(config, train=train))
    return list(made.values())


def _plain(value) -> str:
    return "+".join(map(_plain, value)) if isinstance(value, (list, tuple)) else str(value)


def run(variant: Variant, overwrite: bool) -> Run:
    """Train it, or go on with what is saved; what is finished is read."""
    directory = Path(variant.config.train.run_dir)
    if not overwrite and (directory / CONFIG).is_file() and gin_config.load(directory / CONFIG) == variant.config:
        done, data = Run.read(directory), variant.config.data
        evaluated = done.eval_at[-1:] == [done.step] or not (data.eval_dataset or data.val_size)
        if done.status == "finished" and evaluated and done.adapter.is_dir():
            return done
    saved = bool(Checkpoints(directory / SAVED, 1).steps()) and not overwrite
    return kjax.train(variant.config, resume=saved, overwrite=not saved)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gin_file", action="append", required=True, metavar="FILE")
    parser.add_argument("--over", action="append", required=True, metavar="NAME=[VALUE, ...]")
    parser.add_argument("--overwrite", action="store_true", help="make all runs anew")
    rest, bindings = gin_bindings(sys.argv[1:])
    args = parser.parse_args(rest)
    console, done, failed, code, comparison = Console(), {}, [], 0, None
    try:
        planned = variants(args.gin_file, bindings, [axis(text) for text in args.over])
        home = Path(planned[0].config.train.run_dir).parent
        if (home / LOCK).exists():
            raise RunError(f"{home}: holds a run itself; choose another directory (--gin.Train.run_dir=...)")
    except KjaxError as error:
        raise SystemExit(f"ablation: {error}") from None
    for number, variant in enumerate(planned, start=1):
        directory = Path(variant.config.train.run_dir)
        console.rule(f"{number}/{len(planned)}  {directory.name}")
        try:
            result = run(variant, args.overwrite)
        except KjaxError as error:
            failed.append(f"{directory.name} failed: {error}")
            console.print(failed[-1], soft_wrap=True, markup=False)
            code = 1
            continue
        if result.losses:
            done.setdefault(variant.row, []).append(result)
            comparison = kjax.compare(done)
            files = comparison.write(home)
        if result.exit_code:
            code = result.exit_code
            console.print("stopped; the same command goes on from here", markup=False)
            break
    if comparison is not None:
        console.print(comparison)
        console.print(*files, sep="\n", soft_wrap=True, markup=False, highlight=False)
    for text in failed:
        console.print(text, soft_wrap=True, markup=False)
    return code


if __name__ == "__main__":
    sys.exit(main())
