"""What the published models need, by `kjax plan`: writes the table of docs/plans.md. No weights are read.

    python experiments/plans.py            # about ten seconds a model, 1 GB
    python experiments/plans.py --models Kimi    # prints the rows of some

Each model trains 16 rows of 512 tokens in one optimiser step: attention, shared and dense MLPs (where it has shared
experts) adapted at rank 8, attention one row at a time, on 2 x Xeon 8488C with one RTX 4090 of 48 GB, the machine of
published DeepSeek-V3 runs.
The config.json contents in plan_models.json are those of the published models, without what training does not read.
"""

import argparse
import json
import tempfile
from pathlib import Path

from kjax import gin_config, plan
from kjax.errors import KjaxError
from kjax.lora import size

HERE = Path(__file__).parent
TABLE = HERE.parent / "docs" / "plans.md"
BEGIN, END = "<!-- made by experiments/plans.py: begin -->", "<!-- end -->"
MACHINE = "xeon-8488c-2s-4090"
SETTINGS = ("Data.max_length=512", "Train.rows_per_step=16", "Train.micro_rows=1", "Train.loss_chunk=512",
            "Lora.rank=8")
HEAD = ("model", "parameters", "routed experts", "main memory beside them", "device memory", "in 4 bits", "adapter",
        "device, host operations", "step")


def row(name: str, content: dict, on: plan.Machine) -> list[str]:
    """The cells of a model; a reason where kjax cannot plan it."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(content))
        groups = ("attention", "shared", "dense") if content.get("n_shared_experts") else ("attention",)
        made = [_plan(directory, on, groups, weights) for weights in ("full", "nf4")]
    if isinstance(made[0], str):
        return [name, made[0], *[""] * (len(HEAD) - 2)]
    first, low = made
    amounts = {table: {row.name: row.amount for row in getattr(first, table)}
               for table in ("parameters", "cache", "host", "work", "disk")}
    return [name, f"{amounts['parameters']['total'] / 1e9:,.1f} G",
            size(amounts["cache"].get("routed experts", amounts["host"].get("routed experts", 0))),
            size(sum(row.amount for row in first.host if row.name != "routed experts")),
            size(sum(row.amount for row in first.device)),
            low if isinstance(low, str) else size(sum(row.amount for row in low.device)),
            size(amounts["disk"]["adapter"]),
            f"{amounts['work']['device operations'] / 1e12:,.0f}, {amounts['work']['host operations'] / 1e12:,.0f} T",
            f"{sum(row.amount for row in first.time):,.0f} s"]


def _plan(directory: str, on: plan.Machine, groups: tuple[str, ...], weights: str):
    low = () if weights == "full" else (f"Model.weights={weights!r}",)
    try:
        config = gin_config.load((), [f"Model.directory={directory!r}", *SETTINGS, f"Lora.targets={groups}", *low],
                                 fallback={"Data.dataset": "x", "Train.run_dir": "x"})
        return plan.plan(config, on)
    except KjaxError as error:
        return "-" if low else f"not planned: {str(error).split(': ', 1)[-1]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="", help="only those whose name holds this; prints instead of writing")
    parser.add_argument("--machine", default=MACHINE, help="as for `kjax plan`")
    args = parser.parse_args()
    models = json.loads((HERE / "plan_models.json").read_text())
    on = plan.machine(args.machine)
    lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    for name, content in models.items():
        if args.models in name:
            lines.append("| " + " | ".join(row(name, content, on)) + " |")
            print(lines[-1], flush=True)
    if not args.models:
        before, _, rest = TABLE.read_text().partition(BEGIN)
        TABLE.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
