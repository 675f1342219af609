"""Public retrieval benchmarks: from their published annotation files to manifests of the clips that are at hand."""

from omni_jax.data.benchmarks.coverage import Coverage, fetch_rows, manifest_rows, match_media, training_rows
from omni_jax.data.benchmarks.items import Annotations, Item
from omni_jax.data.benchmarks.registry import BENCHMARKS, read_annotations
