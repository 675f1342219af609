"""The benchmarks by name, and the reading of their annotations with the split applied."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from omni_jax.data.benchmarks import captioned
from omni_jax.data.benchmarks.items import Annotations, PathLike, read_text
from omni_jax.data.benchmarks.omni_bench import omni_bench
from omni_jax.io.messages import lines_of_text
from omni_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
      media: manifest fields that a clip's file fills.
      read: (annotation file, restricted pickle reader) -> annotations; None for the CSV whose columns may be named.
      split: what the file given with --split is called where the annotations hold more than the test clips.
    """

    media: tuple[str, ...]
    read: Callable[[PathLike], Annotations] | None
    split: str | None = None


BENCHMARKS: Mapping[str, Benchmark] = {
    "omniretriever": Benchmark(("video", "audio"), None),
    "clotho": Benchmark(("audio",), captioned.clotho),
    "clotho_v2": Benchmark(("audio",), captioned.clotho),
    "audiocaps": Benchmark(("audio",), captioned.audiocaps),
    "sounddescs": Benchmark(("audio",), captioned.sounddescs, "test_list.txt"),
    "msrvtt": Benchmark(("video",), captioned.msrvtt),
    "msvd": Benchmark(("video",), captioned.msvd, "test_list.txt"),
    "didemo": Benchmark(("video",), captioned.didemo),
    "vatex": Benchmark(("video",), captioned.vatex, "a list of test ids"),
    "youcook2": Benchmark(("video",), captioned.youcook2),
    "youcook2_train": Benchmark(("video",), captioned.youcook2_train),
}


def read_annotations(name: str, path: PathLike, *, split: PathLike | None = None, columns: Mapping[str, str] | None = None) -> Annotations:
    """Returns the clips of a benchmark's annotation file.

    Args:
      name: of BENCHMARKS.
      split: text file of the clip ids to keep, one a line, as the test lists are published.
      columns: role -> column name, for OmniRetriever-Bench.

    Raises:
      InputError: for an unknown name, a file of another form, or a split that shares no id with it.
    """
    if name not in BENCHMARKS:
        raise InputError(f"benchmark {name!r} is unknown; choose one of {', '.join(BENCHMARKS)}")
    read = BENCHMARKS[name].read
    if read is None:
        found = omni_bench(path, columns)
    elif columns:
        raise InputError(f"--column: the columns of {name} are as published; leave it out")
    else:
        found = read(path)
    if split is None:
        return found
    wanted = dict.fromkeys(line.strip() for line in lines_of_text(read_text(split).encode()) if line.strip())
    by_id = {item.id: item for item in found.items}
    items = tuple(by_id[i] for i in wanted if i in by_id)
    if not items:
        raise InputError(f"{split}: none of its {len(wanted)} ids appears in {path}; is it the split of {name}?")
    absent = (f"{split}: clip {i!r} is not in {path}" for i in wanted if i not in by_id)
    return dataclasses.replace(found, items=items, problems=(*found.problems, *absent))
