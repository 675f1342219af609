"""One of several processes that load a converted folder together: started with ADDRESS COUNT INDEX MODEL MESHES OUT."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import numpy as np

from omni_jax import conversion
from omni_jax.model import param_shardings
from omni_jax.parallel import barrier, make_mesh, start


def main(address: str, count: str, index: str, model: str, meshes: str, out: str) -> None:
    """Loads onto each mesh, compares what its devices hold with the whole, and writes [[bytes read, bytes of the whole] ...] to OUT."""
    start(address, int(count), int(index))
    _, whole = conversion.load(model)
    counts: list[tuple[int, int]] = []
    for data, fsdp, tensor in json.loads(meshes):
        mesh = make_mesh(data, fsdp, tensor)
        _, params = conversion.load(
            model, shardings=functools.partial(param_shardings, mesh=mesh), report_bytes=lambda *n: counts.append(n)
        )
        assert params.keys() == whole.keys()
        for path, leaf in params.items():
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(whole[path])[shard.index], strict=True, err_msg=str(path))
    Path(out).write_text(json.dumps(counts))
    barrier("compared")


if __name__ == "__main__":
    main(*sys.argv[1:])
