"""Rows of measurements as a table, beside the bar they are held to, and as a roofline."""

import statistics
from pathlib import Path

# share of the limit, forward / forward + backward, at 16, 128, 512 and 2048 tokens; a token alone: forward
_QUANTISED = {"v2-lite": [(0.70, 0.60), (0.60, 0.60), (0.80, 0.76), (0.85, 0.82)],
              "v3": [(0.70, 0.65), (0.68, 0.66), (0.83, 0.80), (0.87, 0.85)]}  # fmt: skip
_BF16 = {"v2-lite": [(0.88, 0.78), (0.72, 0.68), (0.82, 0.78), (0.86, 0.84)],
         "v3": [(0.90, 0.82), (0.77, 0.73), (0.87, 0.84), (0.88, 0.87)]}  # fmt: skip
_AVX2 = {512: 0.75, 2048: 0.78}
_ONE = 0.75
_LORA = (0.15, 0.20)  # what adapters may cost from 128 tokens on
# times faster than the fastest peer in bf16, and than kt-kernel in a quantised format (forward)
_PEERS = {16: (1.8, 2.0), 128: (2.0, 2.2), 512: (1.4, 1.6), 2048: (1.3, 1.4)}
_KT = {"fp8_block": {128: 2.5, 512: 3.5, 2048: 3.8}, "int8_group128": {128: 1.8, 512: 2.1, 2048: 2.1},
       "int4_group32": {128: 1.8, 512: 2.1, 2048: 2.1}}  # fmt: skip
PASSES = ("forward", "forward+backward")


def share_wanted(row: dict) -> float | None:
    """The share of the limit that a row of kjax is held to."""
    which = PASSES.index(row["pass"])
    if row["isa"] == "avx2":
        return _AVX2.get(row["tokens"]) if row["format"] == "bf16" else None
    if row["isa"] not in ("avx512bf16", "amx") or row["format"] == "fp32":
        return None
    if row["tokens"] == 1:
        return _ONE if which == 0 else None
    cells = (_BF16 if row["format"] == "bf16" else _QUANTISED).get(row["shape"])
    at = [16, 128, 512, 2048]
    return cells[at.index(row["tokens"])][which] if cells and row["tokens"] in at else None


def against_peers(row: dict, rows: list[dict]) -> tuple[float, str, float | None] | None:
    """(times faster, than whom, times wanted) against the fastest peer of the same case."""
    same = ("shape", "format", "tokens", "pass")
    peers = [r for r in rows if r["who"] != "kjax" and all(r[k] == row[k] for k in same)
             and bool(r["lora"]) == bool(row["lora"])]  # fmt: skip
    if row["who"] != "kjax" or row["isa"] not in ("avx512bf16", "amx") or not peers:
        return None
    fastest = min(peers, key=lambda r: r["milliseconds"])
    which = PASSES.index(row["pass"])
    if row["lora"]:
        return fastest["milliseconds"] / row["milliseconds"], fastest["who"], None
    wanted = _PEERS.get(row["tokens"], (None, None))[which] if row["format"] == "bf16" else None
    if row["format"] in _KT and which == 0:
        wanted = _KT[row["format"]].get(row["tokens"])
    return fastest["milliseconds"] / row["milliseconds"], fastest["who"], wanted


def _beside(value: float, wanted: float | None, form: str) -> str:
    if wanted is None:
        return format(value, form)
    return f"{value:{form}} ({'' if value >= wanted else 'below '}{wanted:{form}})"


def _cost(row: dict, bar: bool) -> str:
    if "cost" not in row:
        return ""
    most = _LORA[PASSES.index(row["pass"])]
    held = f" ({'above ' if row['cost'] > most else ''}{most:.0%})" if bar and row["tokens"] >= 128 else ""
    return f"{row['cost']:.1%}{held}"


def table(rows: list[dict], bar: bool) -> str:
    """Markdown; with `bar`, what each figure is held to stands in brackets beside it."""
    head = ["who", "ISA", "shape", "format", "tokens", "pass", "ms", "share of limit", "bound", "GFLOP/s", "of peak",
            "adapters cost", "against the fastest peer", "error / rounding (y, dx, dgate; worst of dA and dB)",
            "quiet"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for row in rows:
        mine = row["who"] == "kjax"
        peer = against_peers(row, rows)
        rounding = [row["errors"].get(f"{name} / rounding") for name in ("y", "dx", "dgate") if row["format"] != "fp32"]
        of_adapters = [v for k, v in row["errors"].items() if k.endswith("/ rounding") and k.startswith(("dA", "dB"))]
        if of_adapters and row["format"] != "fp32":
            rounding.append(max(of_adapters))
        lines.append([
            row["who"] + (f", LoRA {row['lora']}" if row["lora"] else ""), row["isa"] if mine else "", row["shape"],
            row["format"], str(row["tokens"]), row["pass"], f"{row['milliseconds']:.2f}",
            _beside(row["share"], share_wanted(row) if bar and mine and not row["lora"] else None, ".2f"),
            row["bound"], f"{row['gflops']:.0f}", f"{row['gflops'] / row['peak_gflops']:.2f}",
            _cost(row, bar), f"{_beside(peer[0], peer[2] if bar else None, '.1f')} {peer[1]}" if peer else "",
            ", ".join(f"{r:.2f}" for r in rounding if r is not None), f"{row['quiet']}/{row['samples']}",
        ])  # fmt: skip
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def roofline(rows: list[dict], path: Path):
    """Forward calls over operations per byte of touched weights, a panel for each shape, below the measured roof."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [r for r in rows if r["pass"] == "forward" and not r["lora"] and r["isa"] not in ("avx2", "scalar")]
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    if not shapes:
        return
    peak = statistics.median(r["peak_gflops"] for r in rows)
    bandwidth = statistics.median(r["bandwidth_gbs"] for r in rows)
    figure, panels = plt.subplots(1, len(shapes), figsize=(6 * len(shapes), 5.2), sharey=True, squeeze=False)
    groups = list(dict.fromkeys((r["who"], r["format"]) for r in rows))
    colours = {fmt: f"C{i}" for i, fmt in enumerate(dict.fromkeys(fmt for _, fmt in groups))}
    for axes, shape in zip(panels[0], shapes, strict=True):
        here = [r for r in rows if r["shape"] == shape]
        reach = [r["flops"] / r["bytes"] for r in here]
        knee = peak / bandwidth
        low, high = min([*reach, knee]) / 1.5, max([*reach, knee]) * 1.5
        axes.loglog([low, knee, high], [low * bandwidth, peak, peak], color="black", linewidth=1.2)
        for who, fmt in groups:
            mine = sorted((r for r in here if (r["who"], r["format"]) == (who, fmt)), key=lambda r: r["tokens"])
            if not mine:
                continue
            ours = who == "kjax"
            style = "o-" if ours else ":^" if who.startswith("kt") else "--s"
            axes.plot(
                [r["flops"] / r["bytes"] for r in mine], [r["gflops"] for r in mine], style, color=colours[fmt],
                markersize=6 if ours else 4, linewidth=1.6 if ours else 0.8, label=f"{who}, {fmt}",
            )  # fmt: skip
        axes.set(xlabel="operations per byte of touched weights", title=f"{shape}, forward, 1 to 2048 tokens")
        axes.grid(True, which="major", linewidth=0.3)
    panels[0][0].set_ylabel("GFLOP/s")
    panels[0][0].text(
        0.03, 0.9, f"roof: {peak:.0f} GFLOP/s, {bandwidth:.0f} GB/s", transform=panels[0][0].transAxes, va="top"
    )
    named = {
        label: handle for axes in panels[0] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    panels[0][-1].legend(named.values(), named.keys(), fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
