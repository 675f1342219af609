"""Tests, and what they share."""

import os

os.environ.setdefault("OMNI_JAX_CACHE", "off")  # nothing that runs from here writes into the home folder
