"""The HTTP service around a scorer; `python -m tarq_jax.serving.server` starts it."""
