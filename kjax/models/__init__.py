"""The models: config.json to a Flax module, one concept a file."""

from kjax.models.config import ModelConfig
from kjax.models.transformer import Cache, Transformer, abstract_params, linears, unembed

__all__ = ["Cache", "ModelConfig", "Transformer", "abstract_params", "linears", "unembed"]
