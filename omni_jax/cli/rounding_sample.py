"""What rounding on the fly loses, measured by a command on some of its own records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from omni_jax.types import EmbeddingTable, Record

if TYPE_CHECKING:
    from omni_jax.api import OmniRetriever
    from omni_jax.retrieval.embedding_pass import Part


def loss_line(
    model: OmniRetriever,
    records: Sequence[Record],
    found: EmbeddingTable,
    count: int,
    embed: Callable[[OmniRetriever, Sequence[Record], tuple[str, ...]], Iterable[Part]],
) -> str:
    """Returns one line; some of the records are embedded once more, with what they multiply not rounded.

    Args:
      model: of weights "int8-dynamic".
      records, found: what was embedded with it, and the vectors.
      count: of the sample, at most.
      embed: (model, records, tables) -> parts.
    """
    from omni_jax.retrieval.embedding_pass import assemble
    from omni_jax.retrieval.rounding_loss import rounding_loss, sample

    chosen = {*sample(found.ids, count)}
    again = [record for record in records if record.id in chosen]
    exact = assemble(again, list(embed(model.as_int8(), again, tuple(found.tables))))
    if not exact.table.ids:
        return "int8-dynamic was not compared with int8: no record of the sample could be embedded again"
    return rounding_loss(found, exact.table).said("int8-dynamic", "int8")
