"""The host call: the one place that knows how a compiled function reaches the kernels.

Two transports carry the same call. `ffi` is an XLA handler inside the C++ module: no Python, no copy, no deadlock; it
exists on the CPU backend. `pure_callback` works on every backend; its host function must not touch JAX (on one core
that deadlocks), so it is numpy in, C++, numpy out.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from kjax import _ext
from kjax.errors import ConfigError
from kjax.offload.lora import PROJECTIONS, ExpertLora

TRANSPORTS = ("auto", "ffi", "pure_callback")


@functools.cache
def _register():
    for name, handler in _ext.ffi_targets().items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")


def resolve(transport: str) -> str:
    """The transport that runs; `auto`: KJAX_TRANSPORT if set, else ffi on the CPU backend, pure_callback elsewhere."""
    if transport == "auto":
        transport = os.environ.get("KJAX_TRANSPORT", "auto")
    if transport not in TRANSPORTS:
        raise ConfigError(f"transport {transport!r}: expected one of {', '.join(TRANSPORTS)}")
    on_cpu = jax.default_backend() == "cpu"
    if transport == "ffi" and not on_cpu:
        raise ConfigError(f"transport 'ffi' runs on the CPU backend only, not on {jax.default_backend()}: use "
                          "'pure_callback' or 'auto'")
    return transport if transport != "auto" else ("ffi" if on_cpu else "pure_callback")


def _bits(array) -> np.ndarray:
    """As numpy; bfloat16 travels as uint16, for which every numpy has a buffer protocol."""
    array = np.asarray(array)
    return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array


def _forward_on_host(layer, x, idx, gate, *more, store, keep, **setting):
    y, slip = _ext.forward(int(store), int(layer), _bits(x), _bits(idx), _bits(gate), bool(keep),
                           _adapters(more, **setting))
    return y.view(x.dtype), np.int32(slip)


def _backward_on_host(layer, slip, x, idx, gate, dy, *more, store, **setting):
    dx, dgate, grads = _ext.backward(int(store), int(layer), int(slip), _bits(x), _bits(idx), _bits(gate), _bits(dy),
                                     _adapters(more, **setting))
    return dx.view(x.dtype), dgate, *(np.asarray(grad, np.float32) for grad in grads)


def _setting(lora: ExpertLora | None) -> dict:
    """What a call says of adapters beside arrays: the attributes of the FFI handlers."""
    scales = dict(lora.scales) if lora else {}
    # Infinite: no adapter. NaN is not equal to itself, and a call outside of jit would be compiled each time.
    return {"scales": tuple(float(np.float32(scales.get(name, np.inf))) for name in PROJECTIONS),
            "dropout": np.float64(lora.dropout if lora and lora.seed is not None else 0.0),
            "host": np.int64(lora.host.id if lora and lora.host else -1)}


def _operands(lora: ExpertLora | None) -> list:
    """The arrays: factors in the order of the projections, then the seed."""
    if lora is None:
        return []
    factors = [factor for name in PROJECTIONS for factor in lora.factors.get(name, ())]
    return factors + ([lora.seed] if lora.seed is not None and lora.dropout else [])


def _adapters(more, *, scales, dropout, host):
    """The arrays and attributes of a call as the kernels take them."""
    if np.isinf(scales).all():
        return None
    return [np.asarray(array) for array in more], list(scales), float(dropout), int(host)


@functools.lru_cache(1024)
def _bound(function, **attributes):
    """One object for one function and setting: by it JAX knows what it has compiled for a call outside of jit."""
    return functools.partial(function, **attributes)


def _call(store, target: str, host_function, attributes: dict, results, layer, *operands):
    """One execution over the store's transport; results differ between the devices of a shard_map as x does."""
    if resolve(store.transport) == "ffi":
        _register()
        attributes = attributes | {"scales": np.array(attributes["scales"], np.float32)}
        out = jax.ffi.ffi_call(target, results)(layer, *operands, **attributes)
    else:
        out = jax.pure_callback(_bound(host_function, **attributes), results, layer, *operands)
    varying = set().union(*(jax.typeof(operand).manual_axis_type.varying for operand in operands))
    return [jax.lax.pcast(result, tuple(varying - jax.typeof(result).manual_axis_type.varying), to="varying")
            for result in out] if varying else out


def forward(store, keep: bool, layer, x, idx, gate, lora: ExpertLora | None = None):
    """y [N,D] in x.dtype and the slip (int32 scalar, 0 unless `keep`) of one execution of the experts."""
    results = (jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((), jnp.int32))
    return _call(store, "kjax_experts_forward", _forward_on_host,
                 {"store": np.int64(store.id), "keep": np.int64(keep), **_setting(lora)}, results,
                 layer, x, idx, gate, *_operands(lora))


def backward(store, layer, slip, x, idx, gate, dy, lora: ExpertLora | None = None):
    """dx [N,D] in x.dtype, dgate [N,K] fp32, and a list of gradients of the adapters.

    Those of the factors, in the order of the projections; of factors on the host, that of the token.
    Takes the stash entry of `slip`, or recomputes from x.
    """
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(gate.shape, jnp.float32)]
    if lora is not None and lora.host is not None:
        results.append(jax.ShapeDtypeStruct((), jnp.float32))
    elif lora is not None:
        results += [jax.ShapeDtypeStruct(f.shape, jnp.float32) for n in PROJECTIONS for f in lora.factors.get(n, ())]
    dx, dgate, *grads = _call(store, "kjax_experts_backward", _backward_on_host,
                              {"store": np.int64(store.id), **_setting(lora)}, tuple(results),
                              layer, slip, x, idx, gate, dy, *_operands(lora))
    return dx, dgate, grads
