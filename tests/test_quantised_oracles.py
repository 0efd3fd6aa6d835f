"""Tensors that compressed-tensors and torch made, decoded bit for bit: packed INT4, FP8 by channel and by block."""

import ml_dtypes
import numpy as np
import pytest
from quantised_cases import CHANNEL, INT4, blockwise

from kjax.offload import formats

torch = pytest.importorskip("torch")
SHAPES = [(136, 160), (64, 32), (5, 416)]


def as_numpy(tensor):
    """As kjax reads it from a file: bf16 by ml_dtypes, FP8 codes as bytes."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return (tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor).numpy()


def decoded(format_, codes, scales, shape):
    out = np.empty(shape, np.float32)
    formats.decode(format_, as_numpy(codes), as_numpy(scales), out)
    return out


@pytest.fixture
def weight(request):
    """A bf16 weight whose rows differ in size, as channels do."""
    rows, columns = request.param
    random = torch.Generator().manual_seed(rows)
    return (torch.randn(rows, columns, generator=random) * torch.rand(rows, 1, generator=random).exp2()).bfloat16()


@pytest.mark.parametrize("weight", SHAPES, indirect=True)
@pytest.mark.parametrize("settings", [INT4, CHANNEL], ids=["int4", "fp8"])
def test_a_weight_that_compressed_tensors_wrote(weight, settings):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import FloatQuantizationCompressor, PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme.model_validate(settings["config_groups"]["group_0"])
    grouped = weight.reshape(len(weight), -1, 32) if settings is INT4 else weight[:, None]
    scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
    made = PackedQuantizationCompressor if settings is INT4 else FloatQuantizationCompressor
    # Scales as the published checkpoints have them: bf16 of groups, fp32 of channels.
    scale = scale.bfloat16() if settings is INT4 else scale.float()
    stored = made.compress({"weight": weight, "weight_scale": scale}, scheme)
    meant = made.decompress(stored, scheme)["weight"].bfloat16()
    if settings is INT4:
        assert stored["weight_shape"].tolist() == list(weight.shape)
        ours = decoded("int4_group32", stored["weight_packed"], stored["weight_scale"], weight.shape)
    else:
        ours = decoded("fp8_channel", stored["weight"], stored["weight_scale"], weight.shape)
    np.testing.assert_array_equal(ours, meant.float().numpy())
    # And it is the weight, within half a step of 15 for INT4 and half of a 3-bit mantissa's last place for FP8.
    bound = scale.float().repeat_interleave(32, 1) * 0.51 if settings is INT4 else weight.float().abs() / 15 + 1e-3
    assert ((torch.from_numpy(ours) - weight.float()).abs() <= bound + weight.float().abs() / 256).all()


@pytest.mark.parametrize("weight", SHAPES, indirect=True)
@pytest.mark.parametrize("power_of_two", [False, True], ids=["float32", "ue8m0"])
def test_a_weight_that_torch_cast_by_block(weight, power_of_two):
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % 128, 0, -rows % 128))
    blocks = padded.reshape(padded.shape[0] // 128, 128, -1, 128)
    scale = blocks.abs().amax((1, 3)) / 448
    scale = scale.log2().ceil().exp2() if power_of_two else scale
    spread = torch.from_numpy(blockwise(scale.numpy(), (128, 128), weight.shape))
    codes = (weight.float() / spread).to(torch.float8_e4m3fn)
    expected = (codes.float() * spread).bfloat16()
    ours = decoded("fp8_block", codes, scale, weight.shape)
    np.testing.assert_array_equal(ours, expected.float().numpy())


def test_every_code_of_torch():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    ours = decoded("fp8_channel", codes[None], torch.ones(1, 1), (1, 256))
    np.testing.assert_array_equal(ours[0], codes.float().numpy())
    assert np.isnan(ours[0, [0x7F, 0xFF]]).all() and np.isfinite(ours).sum() == 254
