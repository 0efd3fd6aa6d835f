"""What `kjax eval` and `kjax predict` judge: a model, with an adapter or without, on rows it was not trained on."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence

from kjax import gin_config, run
from kjax.config import Config
from kjax.data import templates
from kjax.errors import ConfigError
from kjax.load import Model, load

NO_DATASET = "(none)"  # Data.dataset where a command names a model only

Which = Config | run.Run | str | os.PathLike


def settings(which: Which, *, base: bool = False, adapter: str | os.PathLike | None = None,
             dataset: str | os.PathLike | None = None) -> Config:
    """The settings that say what is judged on which rows; Model.adapter is then the adapter on the model.

    Args:
      which: a run or its directory, for its newest adapter on its evaluation rows; or settings.
      base: judge the model without the adapter, but with its chat template.
      adapter: another adapter than that of `which`.
      dataset: a file of rows to judge on, or an entry of Data.dataset_dir, instead of those of `which`.
    """
    if isinstance(which, Config):
        rows = {} if dataset is None else _rows(dataset)
        config = dataclasses.replace(which, data=dataclasses.replace(which.data, **rows))
        return _on(config, adapter or config.model.adapter, base)
    return of_run(which.directory if isinstance(which, run.Run) else which, (), (), base, adapter, dataset)


def of_run(directory: str | os.PathLike, files: Sequence[str], bindings: Sequence[str], base: bool = False,
           adapter: str | os.PathLike | None = None, dataset: str | os.PathLike | None = None) -> Config:
    """The settings of a run with gin files and bindings on top; arguments as for `settings`."""
    config, newest = run.settings(directory, files, [*_bindings(dataset), *bindings])
    return _on(config, adapter or newest, base)


def of_model(directory: str | os.PathLike, files: Sequence[str], bindings: Sequence[str], base: bool = False,
             adapter: str | os.PathLike | None = None, dataset: str | os.PathLike | None = None) -> Config:
    """Settings from a checkpoint directory, gin files and bindings; arguments as for `settings`."""
    config = gin_config.load(files, [f"Model.directory={str(directory)!r}", *_bindings(dataset), *bindings],
                             fallback={"Data.dataset": NO_DATASET, "Train.run_dir": "unused"})
    if config.data.eval_dataset is None and config.data.dataset == NO_DATASET:
        raise ConfigError("there are no rows to judge on: name a dataset (--dataset FILE)")
    return _on(config, adapter or config.model.adapter, base)


def _rows(dataset: str | os.PathLike) -> dict:
    """Settings of Data that read a file as it is, whatever they said of another."""
    return {"eval_dataset": str(dataset), "eval_select": {}, "val_size": 0.0, "limit": None, "format": "auto"}


def _bindings(dataset: str | os.PathLike | None) -> list[str]:
    return [] if dataset is None else [f"Data.{name}={value!r}" for name, value in _rows(dataset).items()]


def _on(config: Config, adapter: str | os.PathLike | None, base: bool) -> Config:
    if base and adapter is None:
        raise ConfigError("base=True (--base) leaves an adapter off, but none is named")
    model = dataclasses.replace(config.model, adapter=None if base or adapter is None else str(adapter))
    template = config.data.template or templates.of_adapter(adapter)
    return dataclasses.replace(config, model=model, data=dataclasses.replace(config.data, template=template))


@contextlib.contextmanager
def opened(config: Config) -> Iterator[Model]:
    """The model of these settings, loaded."""
    chosen = config.model
    with load(chosen.directory, chosen.adapter, chosen.dtype, chosen.experts, weights=chosen.weights,
              template=config.data.template, transport=chosen.transport, storage=chosen.storage,
              experts_home=config.lora.experts_home) as loaded:
        yield loaded


def title(config: Config) -> str:
    """The model and its adapter in words."""
    return config.model.directory + (f" with {config.model.adapter}" if config.model.adapter else ", no adapter")
