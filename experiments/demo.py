"""The main job in a minute: replies before, LoRA fine-tuning with the experts on the host, replies after.

Command: make demo, or python experiments/demo.py [--steps N] [--run-dir DIRECTORY]
"""

import argparse
import json
import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

import kjax
from kjax import gin_config
from kjax.errors import KjaxError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "experiments/configs/demo.gin"
DATA = "experiments/data/keeper.jsonl"
TRAINED = ("Hello!", "What is a lighthouse?")
LENGTH = 80  # tokens; the longest reply in the data has about 50


def held_out(count: int) -> list[str]:
    """Questions of the evaluation split: their keeper's answers are never trained."""
    rows = [json.loads(line) for line in (ROOT / DATA).read_text(encoding="utf-8").splitlines()]
    return [row["messages"][0]["content"] for row in rows if row["split"] == "eval"][:count]


def replies(directory: str, adapter: Path | None, questions: list[str]) -> list[str]:
    """One greedy reply to each question, from the base or with the adapter on it."""
    with kjax.load(directory, adapter, dtype="float32") as model:
        return [model.generate([{"role": "user", "content": question}], max_new_tokens=LENGTH).strip()
                for question in questions]


def show(console: Console, questions: list[str], before: list[str], after: list[str]):
    """Both replies side by side; what was not trained is marked."""
    table = Table(title="The same questions before and after", show_lines=True)
    table.add_column("question")
    table.add_column("before", style="dim")
    table.add_column("after", style="bold")
    for question, first, second in zip(questions, before, after, strict=True):
        table.add_row(question if question in TRAINED else f"{question}\n(held out)", first, second)
    console.print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="optimiser steps, instead of those in the config")
    parser.add_argument("--run-dir", help="where the run goes, instead of runs/demo; an earlier run there is replaced")
    args = parser.parse_args()
    given = {"STEPS": args.steps, "RUN_DIR": args.run_dir and str(Path(args.run_dir).absolute())}
    os.chdir(ROOT)  # the config's paths start here
    console = Console()
    try:
        config = gin_config.load(CONFIG, {name: value for name, value in given.items() if value is not None})
        questions = [*TRAINED, *held_out(6)]
        base = config.model.directory
        before = replies(base, None, questions)
        console.print("[bold]Before fine-tuning[/bold] the base answers plainly:")
        for question, reply in list(zip(questions, before, strict=True))[:3]:
            console.print(f"  {question} -> {reply}", highlight=False, soft_wrap=True)
        run = kjax.train(config, overwrite=True)
        after = replies(base, run.adapter, questions)
    except KjaxError as error:
        raise SystemExit(f"demo: {error}") from None
    show(console, questions, before, after)
    shown = {"adapter (PEFT)": run.adapter, "loss plot": run.plot, "log": Path(run.directory) / "trainer_log.jsonl"}
    for name, path in shown.items():
        console.print(f"{name:15} {path}", highlight=False, soft_wrap=True)
    console.print(f"talk to it:     .venv/bin/kjax chat --run {run.directory}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
