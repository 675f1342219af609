"""An adapter ready for the Hub: PEFT's files and a model card."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from omni_jax.api.weights import ModelSource
from omni_jax.retrieval.directions import AVERAGES, DIRECTIONS
from omni_jax.train.workdir import WorkdirConfig
from omni_jax.types import InputError

EVALUATIONS = "evaluations"
CARD = "README.md"

_CARD = """---
{front}---

# {title}

LoRA adapter of `{base}` (rank {rank}, alpha {alpha}) for embeddings of text, video, audio and their combinations, trained with omni_jax.

```python
from omni_jax import OmniRetriever

model = OmniRetriever.from_pretrained("{base}", adapter="{repo}")
```

## Data

{data}

## Recipe

{recipe}

## Results

{results}

## Loading it in PyTorch

`peft.PeftModel.from_pretrained(base, "{repo}")` adds it to the base. BEATs' position convolution in the base is weight-normed: some
versions of transformers rename its weights while they read them and leave the convolution at random, without an error, and every
embedding of sound is then wrong. Compare its weights with the file's before you trust a result (`README.omni_jax.md` of an export has
three lines that do).
"""


def write_adapter(source: ModelSource, out: str | os.PathLike[str], base: str) -> None:
    """Writes the PEFT adapter of a model to a new folder.

    Args:
      base: name of the base checkpoint, for `adapter_config.json` of what a run trained.

    Raises:
      InputError: for a model without an adapter, or where more than the adapter trained, or `out` exists.
    """
    if source.config.lora is None:
        raise InputError(f"{source.folder}: has no adapter to publish; export the whole model with omni-jax convert to-torch --base-out")
    made = source.to_torch(adapter_out=out, base_model=base)
    if made.left_out:
        names = ", ".join(sorted(made.left_out)[:3])
        raise InputError(
            f"the run trained more than its adapter holds ({names}); publish base and adapter from omni-jax convert to-torch --base-out"
        )


def model_card(source: ModelSource, *, repo: str, base: str, data: str, licence: str | None = None) -> str:
    """Returns the model card of an adapter: base, data, recipe, results, and what to look at when it is loaded in PyTorch.

    Recipe and results are those of the run whose workdir the source is; for a converted folder the card says that they are not known.

    Args:
      repo, base: names on the Hub.
      data: what it was trained on, in words; a folder's name would say nothing to others.
      licence: an identifier as the Hub lists them; None leaves it out.
    """
    lora = source.config.lora
    assert lora is not None
    front = [f"base_model: {base}", "library_name: peft", "pipeline_tag: feature-extraction"]
    front += [f"license: {licence}"] if licence else []
    front += ["tags:", "- omni_jax", "- lora", "- retrieval", "- audio", "- video"]
    return _CARD.format(
        front="".join(f"{line}\n" for line in front),
        title=repo.rpartition("/")[2],
        base=base,
        repo=repo,
        rank=lora.rank,
        alpha=f"{lora.alpha:g}",
        data=data,
        recipe=_recipe(source.run, source.step) if source.run is not None else "The recipe is not recorded.",
        results=_results(source.home if source.run is not None else None, source.step),
    )


def _recipe(config: WorkdirConfig, step: int | None) -> str:
    run = config.run
    batch, optimizer, losses = (run.get(name, {}) for name in ("batch", "optimizer", "losses"))
    rows = {
        "steps": f"{step} of {config.total_steps}",
        "clips a step": batch.get("micro_batch", 0) * batch.get("micro_batches", 1),
        "optimizer": _listed(optimizer),
        "losses": _listed(losses),
        "trained": _listed(run.get("trainable", {})),
        "weights": run.get("model", {}).get("dtype"),
        "seed": run.get("seed"),
    }
    return "\n".join(["| field | value |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows.items())])


def _results(workdir: epath.Path | None, step: int | None) -> str:
    """The newest evaluation of a run up to a step, as a table; a sentence where there is none."""
    files = {}
    if workdir is not None:
        for path in (workdir / EVALUATIONS).glob("*.json"):
            if path.stem.isdecimal() and (step is None or int(path.stem) <= step):
                files[int(path.stem)] = path
    if not files:
        return "No evaluation is recorded."
    number = max(files)
    try:
        found: Mapping[str, Any] = json.loads(files[number].read_text())
        directions = {name: found["directions"][name] for name in DIRECTIONS if name in found["directions"]}
        lines = ["| direction | R@1 | R@5 | R@10 |", "|---|---|---|---|"]
        lines += [f"| {name} | {m['R@1']:.2f} | {m['R@5']:.2f} | {m['R@10']:.2f} |" for name, m in directions.items()]
        lines += [f"| {name} | {found[name]:.2f} | | |" for name in AVERAGES if found.get(name) is not None]
        head = f"After {number} steps, on {found['n']} held-out clips, in percent; ties: {found['tie_policy']}."
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{files[number]}: cannot be read ({type(e).__name__}: {e}); remove it, or evaluate again") from None
    return "\n".join([head, "", *lines])


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_cell(value)}" for name, value in fields.items() if value not in (None, "", {}, []))


def _cell(value: Any) -> str:
    """A value as a table's cell, without what would end the cell."""
    return re.sub(r"[|\n]", " ", json.dumps(value) if isinstance(value, dict | list) else str(value))


def write_card(folder: str | os.PathLike[str], card: str) -> None:
    """Writes the model card of a folder in place of the one there."""
    (Path(folder) / CARD).write_text(card, encoding="utf-8")
