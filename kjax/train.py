"""Fine-tuning, from settings to an adapter: what is checked, told and loaded before the first step."""

from rich.console import Console

from kjax import _ext, env, job, models
from kjax.config import Config
from kjax.errors import RunError
from kjax.fit import Fit, saves_to_come
from kjax.identity import Identity, differences
from kjax.offload import stash
from kjax.offload.store import ExpertStore
from kjax.progress import banner
from kjax.run import Run
from kjax.run_directory import RunDirectory
from kjax.weights.load import load_params, open_experts
from kjax.weights.safetensors import Checkpoint


def train(config: Config, resume: bool | str = False, overwrite: bool = False, *,
          console: Console | None = None) -> Run:
    """Fine-tune an adapter as the settings say, and write it with its log and plot to config.train.run_dir.

    The first Ctrl-C or SIGTERM ends the run after the step in progress and saves it; the second stops at once, and the
    last saved state stays. Run.status tells.

    Args:
      resume: go on from the newest saved state of run_dir; the result is bit for bit that of an uninterrupted run.
        "changed" goes on although the data, the base or a setting that the state depends on has changed.
      overwrite: replace the run in run_dir.
      console: where to show progress; standard output unless given.
    """
    console = console or Console()
    with RunDirectory(config.train.run_dir, keep=config.train.keep, resume=bool(resume),
                      overwrite=overwrite) as directory:
        env.check()
        if overwrite and config.model.adapter is not None:
            directory.require_outside("Model.adapter", config.model.adapter)
        saved = _saved_state(directory, console) if resume else None
        prepared = job.prepare(config, resuming=saved is not None)
        rows = job.rows(prepared, directory.path, _ext.isa()["name"], _ext.threads())
        banner(console, "kjax: resuming" if resume else "kjax", rows, prepared.table)
        if saved is not None:
            _compare(saved, prepared.identity, console, force=resume == "changed")
        saves = saves_to_come(config.train.save_steps, 0 if saved is None else saved["step"], prepared.total_steps)
        directory.require_space(prepared.table.training_bytes, saves)  # 16 bytes a number: 12 of state, 4 of adapter
        params, store = _load(config, prepared)
        if store is not None and store.refused:
            console.print(f"experts may lie on another memory node than the threads that read them: {store.refused}",
                          soft_wrap=True, markup=False)
        try:
            directory.clear()
            return Fit(prepared, directory, params, store, console).run(None if saved is None else saved["step"])
        except OSError as error:
            raise RunError(f"{directory.path}: cannot be written ({error.strerror or error}); what was saved before "
                           "is intact: mend it and resume") from error
        finally:
            if store is not None:
                store.close()


def _saved_state(directory: RunDirectory, console: Console) -> dict:
    """The manifest of the newest state, checked file by file."""
    for path in directory.checkpoints.unfinished():
        console.print(f"{path}: a save that was cut short, not used", soft_wrap=True, markup=False)
    return directory.checkpoints.latest()[1]


def _compare(saved: dict, identity: Identity, console: Console, *, force: bool) -> None:
    said, binding = differences(saved, identity)
    for line in said:
        console.print(f"differs from the saved state: {line}", soft_wrap=True, markup=False)
    if binding and not force:
        raise RunError("this run is not the one that was saved:\n  " + "\n  ".join(binding) + "\nGo back to the saved "
                       "settings, start over with --overwrite, or go on all the same with --resume changed")


def _load(config: Config, prepared: job.Job) -> tuple[dict, ExpertStore | None]:
    with Checkpoint(config.model.directory) as files:
        abstract = models.abstract_params(prepared.model, config.model.dtype, config.model.experts)
        params = load_params(files, prepared.model, abstract, config.model.weights)
        store = None
        if config.model.experts == "host":
            store = open_experts(files, prepared.model, transport=config.model.transport,
                                 storage=prepared.storage.mode if prepared.storage else "mapped")
            stash.set_budget(config.model.stash_gb)
    return params, store
