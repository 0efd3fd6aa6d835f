"""The names that gin can bind, `Lora.rank` and so on, and what was probably meant by one that it cannot."""

import difflib
import functools
import typing
from collections.abc import Iterable
from typing import Any

from kjax import config as settings
from kjax.errors import ConfigError

CLASSES = {cls.__name__: cls for cls in
           (settings.Model, settings.Lora, settings.Data, settings.Optimizer, settings.Train)}

# Names that users of other trainers (LLaMA-Factory, peft, transformers) type first.
SYNONYMS = {
    "lr": "Optimizer.learning_rate", "batch_size": "Train.rows_per_step", "cutoff_len": "Data.max_length",
    "per_device_train_batch_size": "Train.rows_per_step", "gradient_accumulation_steps": "Train.rows_per_step",
    "max_seq_length": "Data.max_length", "lora_rank": "Lora.rank", "r": "Lora.rank", "lora_alpha": "Lora.alpha",
    "lora_dropout": "Lora.dropout", "lora_target": "Lora.targets", "target_modules": "Lora.targets",
    "num_train_epochs": "Train.epochs", "max_steps": "Train.steps", "output_dir": "Train.run_dir",
    "model_name_or_path": "Model.directory", "model_path": "Model.directory", "max_grad_norm": "Optimizer.clip_norm",
    "lr_scheduler_type": "Optimizer.schedule", "packing": "Data.rows",
}


@functools.cache
def hints(name: str) -> dict[str, Any]:
    """The settings of a class with their types."""
    return typing.get_type_hints(CLASSES[name])


def key_of(scope: str, selector: str, argument: str, where: str) -> tuple[str, bool]:
    """("Lora.rank", False), or ("RANK", True) for a macro. Unknown names are refused with a suggestion."""
    if not argument:
        if scope:
            raise ConfigError(f"{where}: {scope}/{selector}: scopes have no meaning here")
        return selector, True
    name = class_name(scope, selector, where, argument)
    if argument not in hints(name):
        raise ConfigError(f"{where}: {name} has no setting {argument!r}{suggest(argument, name)}; "
                          f"it has {', '.join(hints(name))}")
    return f"{name}.{argument}", False


def class_name(scope: str, selector: str, where: str, argument: str = "") -> str:
    if scope:
        raise ConfigError(f"{where}: {scope}/{selector}: scopes have no meaning here; write {selector} alone")
    name = selector.removeprefix("kjax.").removeprefix("config.")
    if name in CLASSES:
        return name
    raise ConfigError(f"{where}: unknown name {selector!r}{near(name, CLASSES) or suggest(argument)}; "
                      f"bindable are {', '.join(CLASSES)}, and macros")


def near(word: str, words: Iterable[str]) -> str:
    """"; did you mean ...?", or nothing when no word comes near."""
    lower = {w.lower(): w for w in words}
    close = difflib.get_close_matches(word.lower(), lower, n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(lower[c] for c in close)}?" if close else ""


def suggest(argument: str, name: str = "") -> str:
    """As `near`, over the settings of all classes (`name` first) and their names in other trainers."""
    homes = [f"{cls}.{argument}" for cls in CLASSES if argument in hints(cls)]
    if not homes and argument.lower() in SYNONYMS:
        homes = [SYNONYMS[argument.lower()]]
    if homes:
        return f"; did you mean {' or '.join(homes)}?"
    if name and (own := near(argument, hints(name))):
        return own
    fields = {field: f"{cls}.{field}" for cls in CLASSES for field in hints(cls)}
    close = difflib.get_close_matches(argument.lower(), fields, n=1, cutoff=0.6)
    return f"; did you mean {fields[close[0]]}?" if close else ""
