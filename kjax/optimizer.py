"""AdamW with global-norm clipping, a warm-up schedule and LoRA+ rates, from the settings."""

import math

import jax
import jax.numpy as jnp
import optax

from kjax import config, lora


def warmup_steps(settings: config.Optimizer, total_steps: int) -> int:
    """The steps of warm-up: as set, or warmup_ratio of all steps, rounded up, but never all of them: in a run of one
    step, whose rate would be 0, nothing would be learned."""
    if settings.warmup_steps is not None:
        return settings.warmup_steps
    return min(math.ceil(settings.warmup_ratio * total_steps), total_steps - 1)


def schedule(settings: config.Optimizer, total_steps: int) -> optax.Schedule:
    """The learning rate of step 0, 1, ...: from 0 up over the warm-up, then constant, linear or half a cosine down.

    The curve is the one of transformers' schedulers, so that published settings mean the same: the first step of a
    warm-up has rate 0, and the rate would reach learning_rate * min_ratio at step `total_steps`.
    """
    peak, warmup = settings.learning_rate, warmup_steps(settings, total_steps)
    decay = max(1, total_steps - warmup)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, peak * settings.min_ratio, decay),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay, settings.min_ratio),
    }[settings.schedule]()
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def clip(grads, norm, limit: float | None):
    """Gradients scaled down to a global norm of `limit`, given their norm, as optax.clip_by_global_norm does it."""
    if limit is None:
        return grads
    return jax.tree.map(lambda g: jnp.where(norm < limit, g, g / norm * limit), grads)


def optimizer(settings: config.Optimizer, total_steps: int, *, clipping: bool = True) -> optax.GradientTransformation:
    """The transformation of the lora tree's gradients: one global norm over the tree, fp32 state.

    clipping: False leaves it to the caller, who knows more of the gradient than this tree.
    LoRA+ (arXiv:2402.12354) multiplies the learning rate of every lora_B, its weight decay with it.
    """
    parts = [
        optax.scale_by_adam(settings.beta1, settings.beta2, settings.epsilon),
        optax.add_decayed_weights(settings.weight_decay),
        optax.scale_by_learning_rate(schedule(settings, total_steps)),
    ]
    if clipping and settings.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(settings.clip_norm))
    if settings.loraplus_ratio != 1.0:
        rates = {"lora_A": optax.identity(), "lora_B": optax.scale(settings.loraplus_ratio)}
        parts.append(optax.partition(rates, lora.labels))
    return optax.chain(*parts)
