"""Each file replaces one part of TARQ, with no change in `tarq_jax`; `small` has what they share."""
