"""`python -m omni_jax`: the same as `omni-jax`."""

from omni_jax.cli.main import entry

entry()
