"""One of several processes that compute the three losses of a shared batch: started with ADDRESS COUNT INDEX OUT."""

from __future__ import annotations

import functools
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from omni_jax.parallel import start
from tests.objectives.test_losses import SCALARS, all_losses, batch, with_gradients

AXES, SHAPE, SCOPE = ("data", "fsdp"), (2, 4), "local"


def inputs() -> list[jax.Array]:
    """Returns the embeddings of the whole batch."""
    return list(batch(8, *[(24, 10)] * 5))


def main(address: str, count: str, index: str, out: str) -> None:
    """Writes losses and gradients under jit ("jit/0" ...) and under shard_map ("map/0" ...) from process 0."""
    start(address, int(count), int(index))
    mesh = jax.make_mesh(SHAPE, AXES, axis_types=(AxisType.Auto,) * 2)
    place = NamedSharding(mesh, P(AXES))
    host = [np.asarray(x) for x in inputs()]
    spread = [jax.make_array_from_callback(x.shape, place, functools.partial(lambda x, at: x[at], x)) for x in host]
    mapped = jax.shard_map(
        functools.partial(all_losses, hard_scope=SCOPE, axis_name=AXES), mesh=mesh, in_specs=(*(P(AXES),) * 5, P(), P()), out_specs=P()
    )
    found = {}
    for name, losses in (("map", mapped), ("jit", functools.partial(all_losses, hard_scope=SCOPE, hard_blocks=8))):
        values, gradients = with_gradients(losses)(*spread, *SCALARS)
        whole = [np.asarray(x) if x.is_fully_replicated else multihost_utils.process_allgather(x, tiled=True) for x in (values, *gradients)]
        found |= {f"{name}/{i}": x for i, x in enumerate(whole)}
    if jax.process_index() == 0:
        np.savez(out, **found)  # type: ignore[arg-type]
    multihost_utils.sync_global_devices("written")


if __name__ == "__main__":
    main(*sys.argv[1:])
