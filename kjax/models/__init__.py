"""The models: config.json to a Flax module, one concept a file."""

from kjax.models.config import ModelConfig
from kjax.models.table import HostTable, take_table
from kjax.models.transformer import Cache, Transformer, abstract_params, head, linears, unembed

__all__ = ["Cache", "HostTable", "ModelConfig", "Transformer", "abstract_params", "head", "linears", "take_table",
           "unembed"]
