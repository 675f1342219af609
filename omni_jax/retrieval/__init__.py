"""Exact retrieval over embedding tables: ranks, metrics in 12 directions, embedding files, tables of results."""

from omni_jax.retrieval.directions import AVERAGES, DIRECTIONS
from omni_jax.retrieval.embedding_file import read_embeddings, write_embeddings
from omni_jax.retrieval.metrics import TIES, evaluate, score
from omni_jax.retrieval.statistics import compare
from omni_jax.retrieval.table import format_comparison, format_differences, format_table

__all__ = [
    "AVERAGES",
    "DIRECTIONS",
    "TIES",
    "compare",
    "evaluate",
    "format_comparison",
    "format_differences",
    "format_table",
    "read_embeddings",
    "score",
    "write_embeddings",
]
