"""kjax: LoRA fine-tuning of very large mixture-of-experts models on one workstation, in JAX."""

import importlib
import sys
import types

from kjax import startup

startup.prepare()

_HOMES = {"Model": "kjax.load", "compare": "kjax.compare", "evaluate": "kjax.evaluate", "load": "kjax.load",
          "predict": "kjax.predict", "train": "kjax.train"}

__all__ = list(_HOMES)


class _Package(types.ModuleType):
    """Imports the public names on first use, so that `kjax --help` does not wait for JAX.

    Importing the module kjax.train binds it as this package's attribute; the function of that name stays in front (as
    of kjax.compare).
    """

    def __getattr__(self, name):
        if name not in _HOMES:
            raise AttributeError(f"module 'kjax' has no attribute {name!r}")
        return getattr(importlib.import_module(_HOMES[name]), name)

    def __setattr__(self, name, value):
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
