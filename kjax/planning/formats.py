"""How many bytes a checkpoint's weights take, from what its config.json says of their format."""

import math
from typing import NamedTuple

from kjax.errors import CheckpointError
from kjax.models.quantization import Quantization


class Format(NamedTuple):
    """How linear layers are stored: bits of a weight, and a scale of some bytes for each group along both axes."""

    name: str
    bits: int
    block: tuple[int, int] = (1, 1)
    scale: int = 0

    def bytes(self, out: int, in_: int) -> int:
        scales = math.ceil(out / self.block[0]) * math.ceil(in_ / self.block[1]) * self.scale
        return out * math.ceil(in_ * self.bits / 8) + scales


WHOLE = {"bfloat16": Format("bf16", 16), "float16": Format("f16", 16), "float32": Format("fp32", 32)}

QUANTISED = {  # by the name in kjax.offload.formats
    "fp8_block": Format("fp8, blocks of 128x128", 8, (128, 128), 4),
    "fp8_channel": Format("fp8, a scale for each row", 8, (1, 1 << 30), 4),
    "int4_group32": Format("int4, groups of 32", 4, (1, 32), 2),
    "int8_group128": Format("int8, groups of 128", 8, (1, 128), 2),
}
EXPERTS_ALONE = {"int4_group32", "int8_group128"}  # published, and made by `kjax quantize`, for the routed experts only


def formats(content: dict, quantization: Quantization | None, where: str) -> tuple[Format, Format]:
    """(of the routed experts, of the other linear layers), as quantization_config and dtype say."""
    text = content.get("text_config") or {}
    name = next((found for c in (text, content) for key in ("dtype", "torch_dtype") if (found := c.get(key))),
                "bfloat16")
    if name not in WHOLE:
        raise CheckpointError(f"{where}: dtype = {name!r}: expected one of {', '.join(WHOLE)}")
    if quantization is None:
        return WHOLE[name], WHOLE[name]
    found = QUANTISED[quantization.format]
    return found, WHOLE[name] if quantization.format in EXPERTS_ALONE else found
