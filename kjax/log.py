"""The record of a run: trainer_log.jsonl with LLaMA-Factory's keys, TensorBoard scalars and the loss plots."""

import datetime
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LOG = "trainer_log.jsonl"
TRAIN_PLOT, EVAL_PLOT = "training_loss.png", "training_eval_loss.png"


@dataclass(frozen=True)
class StepTimes:
    """One step's speed: seconds in all, of which seconds in the host kernels, and the tokens it processed."""

    seconds: float
    host_seconds: float
    tokens: int  # real tokens, without padding
    slots: int  # places in the batch, padding included

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def padded(self) -> float:
        """The share of the batch that is padding."""
        return 1 - self.tokens / self.slots

    @property
    def host_share(self) -> float:
        """The share of the step in which the host kernels ran; the rest is the device and the traffic between."""
        return min(1.0, self.host_seconds / max(self.seconds, 1e-9))


def clock(seconds: float) -> str:
    """h:mm:ss."""
    return str(datetime.timedelta(seconds=int(seconds)))


def smoothed(values: Sequence[float]) -> list[float]:
    """An exponential moving average over about a twentieth of the curve (at least two points).

    It starts at the first value and is not corrected for the start.
    """
    weight = 2 / (1 + max(2.0, len(values) / 20))
    out: list[float] = []
    for value in values:
        out.append(value if not out else out[-1] + weight * (value - out[-1]))
    return out


def plot(path: Path, label: str, curve: Sequence[tuple[int, float]], *, smooth: bool) -> None:
    """Draw a loss curve of (step, loss) to a PNG file, replacing it as a whole."""
    from matplotlib.figure import Figure  # here: it takes half a second that a run without plots need not wait

    figure = Figure(figsize=(7, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    steps, values = [step for step, _ in curve], [value for _, value in curve]
    marker = {"marker": "o", "markersize": 3} if len(curve) < 30 else {}
    if smooth:
        axes.plot(steps, values, color="tab:blue", alpha=0.4, label=label, **marker)
        axes.plot(steps, smoothed(values), color="tab:blue", label="smoothed")
        axes.legend()
    else:
        axes.plot(steps, values, color="tab:orange", label=label, **marker)
    axes.set(xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    write_whole(path, drawn.getvalue())


class RunLog:
    """Writes what a run measures; after a resume it goes on where the saved state is.

    Attributes: losses, eval_losses: lists of (step, loss), of the whole run, earlier parts included.
    """

    def __init__(self, directory: Path, total_steps: int, *, start_step: int = 0, tensorboard: bool = True,
                 plots: bool = True):
        """start_step: steps that the restored state has done; entries after it belong to a lost part and go."""
        self.directory, self.total_steps = directory, total_steps
        self._plots = plots
        self._entries = [entry for entry in read(directory / LOG) if entry["current_steps"] <= start_step]
        self.total_tokens = max((entry.get("total_tokens", 0) for entry in self._entries), default=0)
        self._seconds_before = max((entry.get("elapsed_seconds", 0.0) for entry in self._entries), default=0.0)
        self.seconds = self._seconds_before
        write_whole(directory / LOG, "".join(json.dumps(entry) + "\n" for entry in self._entries).encode())
        self._file = open(directory / LOG, "a", encoding="utf-8", buffering=1)
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            purge = start_step + 1 if start_step else None
            self._board = SummaryWriter(str(directory / "tb"), purge_step=purge, flush_secs=10)

    @property
    def losses(self) -> list[tuple[int, float]]:
        return [(entry["current_steps"], entry["loss"]) for entry in self._entries if "loss" in entry]

    @property
    def eval_losses(self) -> list[tuple[int, float]]:
        return [(entry["current_steps"], entry["eval_loss"]) for entry in self._entries if "eval_loss" in entry]

    def text(self, name: str, markdown: str) -> None:
        """A text for TensorBoard: the settings."""
        if self._board:
            self._board.add_text(name, markdown)

    def step(self, step: int, *, loss: float, rate: float, grad_norm: float, epoch: float, elapsed: float,
             times: StepTimes) -> dict:
        """Record training step `step` (from 1); elapsed: seconds since this process began to train."""
        self.total_tokens += times.tokens
        self._clock(elapsed)
        entry = {
            **self._position(step), "loss": loss, "lr": rate, "epoch": round(epoch, 4), **self._progress(step, elapsed),
            "grad_norm": grad_norm, "step_seconds": round(times.seconds, 4),
            "host_seconds": round(times.host_seconds, 4), "padded": round(times.padded, 4),
        }  # fmt: skip
        self._write(entry)
        self._scalars(step, {
            "train/loss": loss, "train/learning_rate": rate, "train/grad_norm": grad_norm, "train/epoch": epoch,
            "speed/tokens_per_second": times.tokens_per_second, "speed/step_seconds": times.seconds,
            "speed/host_share": times.host_share, "speed/padded": times.padded,
        })  # fmt: skip
        return entry

    def evaluation(self, step: int, *, loss: float, accuracy: float, epoch: float, elapsed: float) -> dict:
        """Record the evaluation loss, and the share of tokens predicted right, after `step` training steps."""
        self._clock(elapsed)
        entry = {**self._position(step), "eval_loss": loss, "eval_accuracy": round(accuracy, 6),
                 "epoch": round(epoch, 4), **self._progress(step, elapsed)}
        self._write(entry)
        self._scalars(step, {"eval/loss": loss, "eval/accuracy": accuracy})
        return entry

    def refresh_plots(self) -> None:
        if self._plots and self.losses:
            plot(self.directory / TRAIN_PLOT, "loss", self.losses, smooth=True)
        if self._plots and self.eval_losses:
            plot(self.directory / EVAL_PLOT, "evaluation loss", self.eval_losses, smooth=False)

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()

    def _clock(self, elapsed: float) -> None:
        self.seconds = self._seconds_before + elapsed

    def _position(self, step: int) -> dict:
        return {"current_steps": step, "total_steps": self.total_steps}

    def _progress(self, step: int, elapsed: float) -> dict:
        remaining = self.seconds / step * (self.total_steps - step) if step else 0.0
        return {
            "percentage": round(100 * step / self.total_steps, 2), "elapsed_time": clock(self.seconds),
            "remaining_time": clock(remaining), "throughput": round(self.total_tokens / max(self.seconds, 1e-9), 2),
            "total_tokens": self.total_tokens, "elapsed_seconds": round(self.seconds, 3),
        }  # fmt: skip

    def _write(self, entry: dict) -> None:
        self._entries.append(entry)
        self._file.write(json.dumps(entry, allow_nan=False) + "\n")

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)


def read(path: Path) -> list[dict]:
    """The entries of a trainer_log.jsonl; a last line that a crash cut short is left out."""
    entries = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("current_steps"), int):
                entries.append(entry)
    return entries


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file of a run; what was there stays until the new one is complete."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
