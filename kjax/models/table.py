"""The embedding table where it stays in host memory: the rows of a batch's tokens go to the device, nothing else."""

from collections.abc import Mapping

import numpy as np

from kjax.errors import DataError


class HostTable:
    """An embedding table [V,D] as a numpy array."""

    def __init__(self, weight: np.ndarray):
        self.weight = weight

    def rows(self, tokens) -> np.ndarray:
        """tokens [B,T] -> their rows [B,T,D]: what the model takes in place of the tokens."""
        tokens = np.asarray(tokens)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < len(self.weight):
            raise DataError(f"token ids from {tokens.min()} to {tokens.max()}: the embedding table has "
                            f"{len(self.weight)} rows; does the tokenizer belong to this model?")
        return self.weight[tokens]

    def batch(self, batch: Mapping) -> dict:
        """A batch with the rows in place of `tokens`."""
        return {**batch, "tokens": self.rows(batch["tokens"])}


def take_table(params: Mapping) -> tuple[dict, HostTable | None]:
    """(what goes to the device, the table) of loaded parameters; None where the table is on the device too."""
    table = params["embed_tokens"]["weight"]
    if not isinstance(table, np.ndarray):
        return dict(params), None
    return {name: part for name, part in params.items() if name != "embed_tokens"}, HostTable(table)
