"""Experiments of more than one run, as commands."""
