"""The loop over optimiser steps: evaluate, save, step, and stop well."""

import contextlib
import filecmp
import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console

from kjax import adapters, env, gin_config, hosted, job, lora, models, step
from kjax import optimizer as optimizers
from kjax.checkpoint import ADAPTER
from kjax.data import Batches
from kjax.errors import RunError
from kjax.interrupt import Cancelled, Interrupts
from kjax.log import RunLog, StepTimes
from kjax.offload.host_lora import HostLora
from kjax.offload.store import ExpertStore
from kjax.progress import StepProgress
from kjax.run import Run
from kjax.run_directory import CONFIG, ENV, OPERATIVE, RunDirectory


class _Compiled:
    """A jitted function, traced by the caller's thread, compiled and run by the thread that interrupts can answer for.

    JAX's context managers (a matmul precision, say) belong to the thread that entered them: tracing elsewhere would
    silently drop them.
    """

    def __init__(self, function: Callable, interrupts: Interrupts, *, donate: tuple = ()):
        self._interrupts = interrupts
        self._jitted = jax.jit(function, donate_argnums=donate, compiler_options=step.compiler_options())
        self._by_shape: dict[tuple, Callable] = {}

    def prepare(self, *args) -> None:
        """Compile for arguments of these shapes; the last argument is the batch, alone in varying."""
        if self._shapes(args) not in self._by_shape:
            self._by_shape[self._shapes(args)] = self._interrupts.call(self._jitted.lower(*args).compile)

    def __call__(self, *args):
        """The results, complete when this returns."""
        execute = self._by_shape[self._shapes(args)]
        return self._interrupts.call(lambda: jax.block_until_ready(execute(*args)))

    @staticmethod
    def _shapes(args) -> tuple:
        return tuple(sorted((name, array.shape) for name, array in args[-1].items()))


# What makes a loss that is no number less likely.
LESS_LIKELY = ("A lower Optimizer.learning_rate, more warm-up or clipping may help; float32 tells whether it is a "
               "matter of rounding")


class Fit:
    """The loop over optimiser steps and what happens between them."""

    def __init__(self, prepared: job.Job, directory: RunDirectory, params: dict, store: ExpertStore | None,
                 console: Console):
        self.job, self.directory, self.store = prepared, directory, store
        self.params, self.table = models.take_table(params)
        self.console, self.settings, self.total = console, prepared.config.train, prepared.total_steps
        self.schedule = optimizers.schedule(prepared.config.optimizer, self.total)
        self.evaluation = None if prepared.evaluation is None else Batches.of_run(
            prepared.config, prepared.evaluation, evaluation=True)
        self.done = self.saved = 0  # steps done; the step of the newest saved state
        self.doing = ""

    def run(self, resume_step: int | None) -> Run:
        """Train from the state of `resume_step`, or from a new adapter."""
        config = self.job.config
        self.host_lora = HostLora(self.store) if self.job.experts_on_host else None
        transformer = models.Transformer(self.job.model, lora=self.job.spec, dtype=jnp.dtype(config.model.dtype),
                                         store=self.store, host_lora=self.host_lora,
                                         micro_rows=self.settings.micro_rows)
        chosen = optimizers.optimizer(config.optimizer, self.total, clipping=self.host_lora is None)
        self.state = self._initial_state(chosen, resume_step)
        self.done = self.saved = resume_step or 0
        if resume_step is not None:
            self._renew_adapter()
        self._write_record()
        status = "finished"
        self.log = RunLog(self.directory.path, self.total, start_step=self.done, tensorboard=self.settings.tensorboard,
                          plots=self.settings.plot)
        try:
            self.log.text("config", f"```\n{gin_config.text(config)}\n```")
            self.progress = StepProgress(self.console, self.total, self.done)
            with self.progress, Interrupts(self._acknowledge) as self.interrupts:
                self._define_steps(transformer, chosen)
                self.started = time.monotonic()
                try:
                    self._steps()
                except Cancelled:
                    status = "cancelled"
                except (jax.errors.JaxRuntimeError, ValueError) as error:
                    if not _failed_inside(error):
                        raise
                    raise RunError(f"{self.doing} failed: {_brief(error)}. {self._last_saved()}") from error
                if status == "finished" and (self.done < self.total or self._evaluation_due()):
                    status = "interrupted"
                signal = self.interrupts.requested if status != "finished" else None
        finally:
            with contextlib.suppress(OSError):  # a full disk has been told by what failed first
                self.log.refresh_plots()
            self.log.close()
        return Run(self.directory.path, status, self.done, self.total, [loss for _, loss in self.log.losses],
                   [loss for _, loss in self.log.eval_losses], [at for at, _ in self.log.eval_losses],
                   exit_code=128 + signal if signal else 0)

    def _define_steps(self, transformer, chosen) -> None:
        """The compiled steps; with adapters on the host each has a part there."""
        chunk, seed, dropout = self.settings.loss_chunk, self.settings.seed, self.job.dropout
        self.eval_step = _Compiled(step.eval_step(transformer, models.unembed, chunk=chunk), self.interrupts)
        if self.host_lora is None:
            train = step.train_step(transformer, models.unembed, chosen, chunk=chunk, seed=seed, dropout=dropout)
            self.train_step = _Compiled(train, self.interrupts, donate=(0,))
            return
        gradients = step.gradients(transformer, models.unembed, chunk=chunk, seed=seed, dropout=dropout)
        clip_norm = self.job.config.optimizer.clip_norm
        device = hosted.device_step(gradients, chosen, clip_norm, self.job.model.num_moe_layers)
        update = hosted.host_update(chosen, clip_norm)
        self.train_step = hosted.TrainStep(self.host_lora, _Compiled(device, self.interrupts, donate=(0,)),
                                           _Compiled(update, self.interrupts, donate=(0, 1)))
        self.eval_step = hosted.EvalStep(self.host_lora, self.eval_step)

    def _initial_state(self, chosen, resume_step: int | None) -> step.State | hosted.HostedState:
        states = hosted if self.host_lora else step
        if resume_step is not None:
            like = states.abstract_state(lora.abstract(self.job.spec, self.job.linears), chosen)
            return self.directory.checkpoints.restore(resume_step, like)
        tree = self.job.adapter
        # What stays on the host would not fit on the device, not even to be drawn.
        with jax.default_device(hosted.cpu()) if self.host_lora else contextlib.nullcontext():
            if tree is None:
                tree = lora.init(self.job.spec, self.job.linears, jax.random.key(self.settings.seed))
        return states.initial_state(tree, chosen)

    def _write_record(self) -> None:
        self.directory.write(CONFIG, gin_config.text(self.job.config, defaults=False))
        self.directory.write(OPERATIVE, gin_config.text(self.job.config))
        self.directory.write(ENV, json.dumps(env.report(), indent=1))

    def _steps(self) -> None:
        """Save and evaluate where due, then step: so a resumed run does what was left undone at its first step."""
        while True:
            stopping = self._stopping()
            due = stopping or self.done == self.total or _due(self.settings.save_steps, self.done)
            if due and self.done > self.saved:
                self._save()
            if not stopping and self._evaluation_due():
                self._evaluate()  # what fails here loses no saved step; a signal meanwhile is answered by the next turn
            elif stopping or self.done >= self.total:
                return
            else:
                self._step()

    def _evaluation_due(self) -> bool:
        if self.evaluation is None or any(at == self.done for at, _ in self.log.eval_losses):
            return False
        return self.done in (0, self.total) or _due(self.settings.eval_steps, self.done)

    def _stopping(self) -> bool:
        self.interrupts.poll()
        return self.interrupts.requested is not None

    def _step(self) -> None:
        number = self.done + 1
        batch = self._inputs(self.job.batches.batch(self.done))
        self._begin(f"compiling for step {number}/{self.total}")
        self.train_step.prepare(self.state, self.params, batch)
        if self._stopping():
            return
        self._begin(f"step {number}/{self.total}")
        started, host = time.monotonic(), self._host_seconds()
        self.state, metrics = self.train_step(self.state, self.params, batch)
        metrics = jax.tree.map(float, metrics)
        seconds = time.monotonic() - started
        if not metrics.finite:
            raise RunError(f"step {number} made a loss of {metrics.loss} with a gradient norm of {metrics.grad_norm}: "
                           f"the run stops before its update. {self._last_saved()}. {LESS_LIKELY}")
        tokens = int((batch["segments"] > 0).sum())
        times = StepTimes(seconds, self._host_seconds() - host, tokens, batch["segments"].size)
        rate = float(self.schedule(self.done))
        self.done, self.doing = number, ""
        self.log.step(number, loss=metrics.loss, rate=rate, grad_norm=metrics.grad_norm,
                      epoch=number / len(self.job.batches), elapsed=time.monotonic() - self.started, times=times)
        self.progress.step(number, metrics.loss, rate, times)

    def _evaluate(self) -> None:
        """The loss over every evaluation example; given up when a signal asks to stop."""
        score = step.Score(0.0, 0.0, 0.0)
        for number, batch in enumerate(self.evaluation, start=1):
            batch = self._inputs(batch)
            self._begin(f"evaluating {number}/{len(self.evaluation)}")
            self.eval_step.prepare(self.state.lora, self.params, batch)
            if self._stopping():
                return
            score += self.eval_step(self.state.lora, self.params, batch)
        loss = score.mean_loss
        if not math.isfinite(loss):
            cause = LESS_LIKELY if self.done else "It is the base, or Model.adapter"
            raise RunError(f"the evaluation after step {self.done} made a loss of {loss}: the run stops. "
                           f"{self._last_saved()}. {cause}")
        self.doing = ""
        self.log.evaluation(self.done, loss=loss, accuracy=score.accuracy, epoch=self.done / len(self.job.batches),
                            elapsed=time.monotonic() - self.started)
        self.progress.say(f"evaluation loss after {self.done} steps: {loss:.4f}, {score.accuracy:.1%} of tokens right")

    def _inputs(self, batch: dict) -> dict:
        return batch if self.table is None else self.table.batch(batch)

    def _save(self) -> None:
        self._begin(f"saving step {self.done}")

        def work():
            self.directory.checkpoints.save(self.done, self.state, self._write_adapter, self.job.identity)
            self._write_adapter(self.directory.adapter)
            self.log.refresh_plots()

        self.interrupts.call(work)
        self.saved, self.doing = self.done, ""
        self.progress.say(f"saved step {self.done}: {self.directory.checkpoints.path(self.done)}")

    def _write_adapter(self, directory: Path) -> None:
        adapters.save(directory, self.state.lora, self.job.spec, self.job.linears, base=self.job.base,
                      chat_template=self.job.tokenizer.chat_template)

    def _renew_adapter(self) -> None:
        """Bring the run's adapter up to the restored state: the save may have been cut short between the two."""
        saved, newest = self.directory.checkpoints.path(self.saved) / ADAPTER, self.directory.adapter
        # The weights are replaced last: where they are right, so is the rest.
        _, differing, missing = filecmp.cmpfiles(saved, newest, [adapters.WEIGHTS], shallow=False)
        if differing or missing:
            self._write_adapter(newest)
            self.console.print(f"{newest}: written again from the state of step {self.saved}", soft_wrap=True,
                               markup=False)

    def _begin(self, what: str) -> None:
        self.doing = what
        self.progress.begin(what)

    def _host_seconds(self) -> float:
        if self.store is None:
            return 0.0
        stats = self.store.stats()
        return stats["forward_seconds"] + stats["backward_seconds"]

    def _last_saved(self) -> str:
        if not self.saved:
            return "Nothing has been saved yet"
        return f"The state of step {self.saved} is in {self.directory.checkpoints.path(self.saved)}"

    def _acknowledge(self, number: int) -> None:
        stepping = self.doing.startswith("step")
        left = self.progress.expected() if stepping else None
        about = "" if left is None else f", about {left:.0f} s"
        if number == 1:
            way = "giving up" if self.doing.startswith("evaluating") else "finishing"
            what = f"{way} {self.doing}{about}" if self.doing else f"stopping after step {self.done}"
            saves = stepping or self.done > self.saved and not self.doing.startswith("saving")
            self.progress.say(f"{what}{', then saving' if saves else ''}; again to stop now")
        else:
            lost = f"{self.doing} is lost. " if self.doing and not self.doing.startswith("saving") else ""
            self.progress.say(f"stopping now: {lost}{self._last_saved()}; once more to wait for nothing")


def _due(every: int | None, done: int) -> bool:
    return every is not None and done > 0 and done % every == 0


def saves_to_come(every: int | None, done: int, total: int) -> int:
    """How many states will be saved after `done` steps, the last one included; a run stopped earlier saves no more."""
    return sum(at == total or _due(every, at) for at in range(done + 1, total + 1))


def _failed_inside(error: Exception) -> bool:
    """Whether compiled code failed; some ways into it raise its status, "INTERNAL: ...", as a plain ValueError."""
    return isinstance(error, jax.errors.JaxRuntimeError) or re.match("[A-Z_]+: ", str(error)) is not None


def _brief(error: Exception) -> str:
    """What failed, without the stack in between; where memory ran out, which settings need less."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
    if "RESOURCE_EXHAUSTED" in text:
        text += " (Train.micro_rows, Train.loss_chunk and Train.rows_per_step set how much memory a step needs)"
    return text
