"""The page beside an exported checkpoint that says how its weight-normed convolution loads, with a check."""

from __future__ import annotations

from collections.abc import Iterable

from omni_jax.conversion.names import NEW_NORM, OLD_NORM

README = "README.omni_jax.md"

_PAGE = """# Loading this checkpoint

BEATs' position convolution is weight-normed, and its weights are stored as `{names}`. `from_pretrained` of transformers may rename such
weights while it reads them; where the model then has no place for them it leaves the convolution at random, without an error and
differently at each load, and every embedding of sound is wrong. Tried with torch 2.13 on a module built as BEATs' is:

| the model is built with | stored as | transformers 4.51.3 | transformers 5.23 |
|---|---|---|---|
| `torch.nn.utils.weight_norm`, as BEATs' published code | `weight_g`, `weight_v` | random | right |
| the same | `parametrizations.weight.original0`, `1` | random | random |
| `torch.nn.utils.parametrizations.weight_norm` | either | right | right |

These three lines check a loaded `model`:

```python
import torch; from {module} import {function} as read
stored = {{k: v for k, v in read("{file}").items() if ".pos_conv." in k}}
for v in stored.values(): assert any(v.shape == p.shape and (v.cpu() - p.cpu()).abs().max() < 1e-2 for p in model.parameters())
```

Where the check fails, load these tensors after `from_pretrained`, under the old names, which `load_state_dict` takes for either:

```python
old = {{k.replace("{new[0]}", "weight_g").replace("{new[1]}", "weight_v"): v for k, v in stored.items()}}
model.load_state_dict(old, strict=False)
```

`omni-jax convert to-torch --weight-norm old` writes the old names, `--weight-norm new` the new ones.
"""


def readme(tensors: Iterable[tuple[str, str]]) -> str | None:
    """Returns the page for a checkpoint of these (file, tensor name); None where it has no weight-normed convolution."""
    normed = [(file, name) for file, name in tensors if ".pos_conv." in name and name.endswith((*OLD_NORM, *NEW_NORM))]
    if not normed:
        return None
    file = normed[0][0]
    module, function = ("torch", "load") if file.endswith(".bin") else ("safetensors.torch", "load_file")
    names = " and ".join(NEW_NORM if normed[0][1].endswith(NEW_NORM) else OLD_NORM)
    return _PAGE.format(file=file, module=module, function=function, names=names, new=NEW_NORM)
