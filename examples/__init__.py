"""One part of TARQ exchanged in each file, with nothing changed in `tarq_jax`; `small` is what they share."""
