"""The errors a user can mend: each names the file, tensor or setting at fault and the way out."""


class KjaxError(ValueError):
    """Base of all; the command line prints its text as one message and exits with 2."""


class ConfigError(KjaxError):
    """A setting or gin file is wrong."""


class CheckpointError(KjaxError):
    """A model directory, shard, tensor or adapter is wrong."""


class DataError(KjaxError):
    """A dataset, chat template or tokenizer is wrong."""


class RunError(KjaxError):
    """A run directory or saved state cannot be used, or a run had to stop."""
