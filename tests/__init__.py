"""Tests, torture and benchmarks."""

import os

os.environ.setdefault("OMNI_JAX_CACHE", "off")  # nothing that runs from here, the torture included, writes into the home folder
