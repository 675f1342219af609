"""Programs for who works on the project: benchmarks, torture, locks, licences, tables of the documentation."""

import os

os.environ.setdefault("OMNI_JAX_CACHE", "off")  # nothing that runs from here writes into the home folder
