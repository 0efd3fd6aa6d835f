"""jax.jit without the compiler's optimiser, for tests of what a program computes, which mostly wait for it."""

import jax


def quick_jit(function):
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
