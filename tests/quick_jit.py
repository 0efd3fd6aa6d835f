"""jax.jit without the optimiser of the machine code, for tests of what a program computes: they mostly wait for it."""

import jax

OPTIONS = {"xla_backend_optimization_level": 0}


def quick_jit(function):
    return jax.jit(function, compiler_options=OPTIONS)
