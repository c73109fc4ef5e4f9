"""One file an experiment: `get_config()` returns its settings."""
