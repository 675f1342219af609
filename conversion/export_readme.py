"""The page beside an exported checkpoint that says how its weight-normed convolution loads, with a check."""

from __future__ import annotations

from collections.abc import Iterable

from conversion.names import NEW_NORM, OLD_NORM

README = "README.omni_jax.md"

_PAGE = """# Loading this checkpoint

BEATs' position convolution is weight-normed, and its weights are stored as `{names}`. `from_pretrained` of transformers renames such
weights while it reads them. Where the model's code has the other style of weight norm it finds none, and leaves the convolution at
random, without an error and differently at each load: every embedding of sound is then wrong. These three lines check a loaded `model`:

```python
import torch; from {module} import {function} as read
stored = {{k: v for k, v in read("{file}").items() if ".pos_conv." in k}}
assert all(any(torch.equal(v.float(), p.float().cpu()) for p in model.state_dict().values() if p.shape == v.shape) for v in stored.values())
```

Where the check fails, `model.load_state_dict(stored, strict=False)` mends it: torch itself knows both spellings. `omni-jax convert to-torch
--weight-norm new` writes `{new}`, which a model built with `torch.nn.utils.parametrizations.weight_norm` loads under every version
of transformers; `--weight-norm old` writes `{old}`. For a model built with `torch.nn.utils.weight_norm` neither
suffices where torch has both styles: load the state dict after `from_pretrained`, as above.
"""


def readme(tensors: Iterable[tuple[str, str]]) -> str | None:
    """Returns the page for a checkpoint of these (file, tensor name); None where it has no weight-normed convolution."""
    normed = [(file, name) for file, name in tensors if ".pos_conv." in name and name.endswith((*OLD_NORM, *NEW_NORM))]
    if not normed:
        return None
    file = normed[0][0]
    module, function = ("torch", "load") if file.endswith(".bin") else ("safetensors.torch", "load_file")
    new, old = (" and ".join(pair) for pair in (NEW_NORM, OLD_NORM))
    names = new if normed[0][1].endswith(NEW_NORM) else old
    return _PAGE.format(file=file, module=module, function=function, names=names, new=new, old=old)
