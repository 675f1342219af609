"""Mines hard negatives of the synthetic clips that `omni-jax ablate` trains on, for its arms with `data.negatives=mined` or `both`.

python -m tools.mined_parts DIR/clips/train MODEL mined.jsonl [--range-min 32]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from omni_jax.api.retriever import OmniRetriever
from omni_jax.cli.config_file import read_config
from omni_jax.data.loading import training_features
from omni_jax.data.manifest import NEGATIVES, write_jsonl_atomic
from omni_jax.data.negatives import LISTS
from omni_jax.data.sources import open_source
from omni_jax.retrieval.embedding_pass import assemble
from omni_jax.retrieval.mining import MiningConfig, mine
from omni_jax.types import Features, Record


def mined(clips: Path, model: str, config: MiningConfig) -> Iterator[dict[str, object]]:
    """Yields the lines of a mined manifest of a prepared folder, embedded by a converted model."""
    preset = read_config("ablation", []).data.resolved_preset()
    source = open_source(clips, preset)
    places = {name: n for n, name in enumerate(source.ids)}
    records = [Record(name, source.captions[n], video=clips / name, audio=clips / name) for name, n in places.items()]

    def load(some: Sequence[Record]) -> Iterator[Features]:
        return (training_features(source.load(places[record.id]), preset) for record in some)

    tables = ("text", "audio", "video", "av", "at", "tv")
    retriever = OmniRetriever.from_pretrained(model, preset=preset)
    table = assemble(records, list(retriever.embed(records, tables, batch_size=32, load=load))).table
    captions = {"same caption": {record.id: record.text for record in records}}
    found = mine(table, config, same=captions, directions=tuple(names[0] for names in LISTS.values())).negatives
    for record in records:
        yield {"id": record.id, "text": record.text, NEGATIVES: found.get(record.id, {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, help="prepared folder")
    parser.add_argument("model", help="converted folder that embeds it")
    parser.add_argument("out", type=Path, help="mined manifest to write")
    parser.add_argument("--range-min", type=int, default=0, help="as of omni-jax mine")
    parser.add_argument("--range-max", type=int, default=200, help="as of omni-jax mine")
    args = parser.parse_args()
    config = MiningConfig(range_min=args.range_min, range_max=args.range_max)
    print(write_jsonl_atomic(args.out, mined(args.clips, args.model, config)), "records")


if __name__ == "__main__":
    main()
