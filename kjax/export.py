"""`kjax export`: an adapter, kjax's or another's, as PEFT files in a chosen layout and type."""

import os
from pathlib import Path
from typing import Literal

from kjax import adapters
from kjax.errors import CheckpointError
from kjax.models import ModelConfig, linears
from kjax.weights.safetensors import Checkpoint


def export(source: str | os.PathLike, adapter: str | os.PathLike, target: str | os.PathLike, *,
           layout: adapters.Layout = "experts", dtype: Literal["float32", "bfloat16"] = "float32",
           base_name: str | None = None, progress: bool = True) -> Path:
    """Writes the PEFT adapter of the checkpoint `source` to the new directory `target`.

    layout: of the routed experts' adapters: "experts" has tensors for each expert, which is what transformers 4 and
    most other programs read; "fused" is what peft makes with transformers 5. See kjax.adapter_layouts.
    base_name: what base_model_name_or_path becomes, a name on the hub for instance; by default `source`.
    Warns of programs that would load only a part of it. Matrices are read as they are written: memory does not grow
    with the number of layers.
    """
    target, adapter = Path(target), Path(adapter)
    if target.exists():
        raise CheckpointError(f"{target}: already exists; give a new directory")
    with Checkpoint(source) as checkpoint:
        base = adapters.identify(checkpoint, base_name)
        found = linears(ModelConfig.from_json(checkpoint.config_json, str(checkpoint.config_path)))
    template = adapter / adapters.TEMPLATE
    with adapters.opened(adapter, found, base) as opened:
        return adapters.write(target, opened.matrix, opened.spec, found, base=base, layout=layout, dtype=dtype,
                              chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
                              progress=progress)
