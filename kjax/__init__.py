"""kjax: LoRA fine-tuning of very large mixture-of-experts models on one workstation, in JAX."""

from kjax import startup

startup.prepare()
