"""The correspondence of one configuration, worked out from the rules: every torch tensor with its leaf, layer and shapes.

Shapes come from the model's own abstract tree, so a change of the model that the rules do not follow fails at once.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Container, Iterable, Iterator, Mapping

import numpy as np

from omni_jax.config import ModelConfig
from omni_jax.conversion.rules import PEFT_PREFIX, Rule, TreePath, base_rules, lora_rules
from omni_jax.conversion.transforms import Identity, Shape, Transform
from omni_jax.io.messages import some
from omni_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Entry:
    """One torch tensor and where it goes.

    Attributes:
      key: name of the torch tensor.
      path: leaf of the parameter tree.
      layer: index on the leaf's leading axis; None where it has none.
      transform: torch -> tree, for one layer.
      tree_shape: shape of the leaf, without the layer axis.
      torch_shape: shape of the torch tensor.
      shared: one of several tensors that must hold the same values; any one of them suffices.
    """

    key: str
    path: TreePath
    layer: int | None
    transform: Transform
    tree_shape: Shape
    torch_shape: Shape
    shared: bool = False

    @property
    def stored(self) -> str:
        """Name under which a converted folder stores it."""
        return stored_name(self.path, self.layer)

    def to_tree(self, array: np.ndarray) -> np.ndarray:
        """Returns the leaf (one layer of it) of a torch tensor: `torch_shape` in, `tree_shape` out, same dtype."""
        return self.transform.forward(array)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """Returns the torch tensor of a leaf (of one layer of it): `tree_shape` in, `torch_shape` out, same dtype."""
        return self.transform.inverse(array)


def stored_name(path: TreePath, layer: int | None) -> str:
    """Returns the name of a leaf (of one layer of it) in a converted folder: `decoder.layers.attn.q.kernel.12`."""
    return ".".join(path if layer is None else (*path, str(layer)))


ORIGINAL = "original"


def original(key: str, shape: Shape) -> Entry:
    """Returns the Entry of a tensor that a converted folder keeps as it was beside what the model takes, for the way back alone."""
    return Entry(key, (ORIGINAL, key), None, Identity(), tuple(shape), tuple(shape))


def base_entries(config: ModelConfig) -> dict[str, Entry]:
    """Returns torch name -> Entry for a checkpoint, in the order of the tree.

    Raises:
      ValueError: the rules and the model's parameter tree do not cover each other (a fault of this program, not of a file).
    """
    return _entries(base_rules(config), tree_shapes(dataclasses.replace(config, lora=None)), config)


def lora_entries(config: ModelConfig) -> dict[str, Entry]:
    """Returns PEFT name -> Entry for the LoRA matrices of `config.lora`, every layer of every target."""
    shapes = {path: shape for path, shape in tree_shapes(config).items() if path[-1].startswith("lora_")}
    return _entries(lora_rules(config), shapes, config)


def saved_entries(config: ModelConfig, base: Mapping[str, Entry]) -> dict[str, Entry]:
    """Returns PEFT name -> Entry for the modules that `config.lora.modules_to_save` trains whole.

    As in PEFT, a listed name stands for every module whose dotted name ends with it.
    """
    names = config.lora.modules_to_save if config.lora else ()
    chosen = {key: entry for key, entry in base.items() if any(inside(key, name) for name in names)}
    return {PEFT_PREFIX + key: dataclasses.replace(entry, key=PEFT_PREFIX + key) for key, entry in chosen.items()}


@functools.lru_cache(maxsize=8)
def tree_shapes(config: ModelConfig) -> Mapping[TreePath, Shape]:
    """Returns the shape of every leaf that a checkpoint has, layer stacks with their leading axis: the model's, and what is carried."""
    # Here, so that reading a header or a `.pt` file does not import the model.
    from omni_jax.model import abstract_params, carried_shapes

    model = {path: tuple(leaf.shape) for path, leaf in abstract_params(config.with_weights("float")).items()}
    return types.MappingProxyType(model | carried_shapes(config))


def check(entries: Mapping[str, Entry], found: Mapping[str, Shape], where: str, remedy: str, optional: Container[str] = ()) -> None:
    """Compares the tensors of a checkpoint with those its configuration asks for. Of shared tensors one suffices.

    Args:
      entries: what is wanted.
      found: name -> shape of what is there.
      where: file or folder for the message.
      remedy: what to do, for the message.
      optional: names that may be missing.

    Raises:
      InputError: naming unknown, missing and misshapen tensors, the first few and the count of each.
    """
    unknown = [key for key in found if key not in entries]
    shared = {entry.path for key, entry in entries.items() if entry.shared and key in found}
    missing = [key for key, entry in entries.items() if key not in found and entry.path not in shared and key not in optional]
    misshapen = [
        f"{key} is {_shape(shape)}, expected {_shape(entries[key].torch_shape)}"
        for key, shape in found.items()
        if key in entries and tuple(shape) != entries[key].torch_shape
    ]
    parts = [
        f"{len(names)} {kind} ({some(names)})"
        for kind, names in (("unknown", unknown), ("missing", missing), ("misshapen", misshapen))
        if names
    ]
    if parts:
        raise InputError(f"{where}: tensors do not fit: {'; '.join(parts)}; {remedy}")


def stacks(entries: Iterable[Entry]) -> dict[TreePath, list[Entry]]:
    """Groups entries by leaf, layers in order."""
    groups: dict[TreePath, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.path, []).append(entry)
    for group in groups.values():
        group.sort(key=lambda entry: entry.layer or 0)
    return groups


def _entries(rules: tuple[Rule, ...], shapes: Mapping[TreePath, Shape], config: ModelConfig) -> dict[str, Entry]:
    paths = [rule.path for rule in rules]
    if len(set(paths)) != len(paths) or set(paths) != set(shapes):
        twice = {path for path in paths if paths.count(path) > 1}
        raise ValueError(
            f"rules and parameter tree differ: leaves without a rule {sorted(set(shapes) - set(paths))}, "
            f"rules without a leaf {sorted(set(paths) - set(shapes))}, leaves with two rules {sorted(twice)}"
        )
    entries = [entry for rule in rules for entry in _expand(rule, shapes[rule.path], config)]
    return {entry.key: entry for entry in entries}


def _expand(rule: Rule, shape: Shape, config: ModelConfig) -> Iterator[Entry]:
    if "{layer}" not in rule.torch:
        yield Entry(rule.torch, rule.path, None, rule.transform, shape, rule.transform.torch_shape(shape))
        return
    one = shape if rule.shared else shape[1:]
    count = config.beats.num_layers if rule.shared and config.beats else shape[0]
    for layer in range(count):
        key = rule.torch.format(layer=layer)
        yield Entry(key, rule.path, None if rule.shared else layer, rule.transform, one, rule.transform.torch_shape(one), rule.shared)


def inside(key: str, module: str) -> bool:
    """Returns whether a tensor belongs to a module whose dotted name ends with `module`, as PEFT reads `modules_to_save`."""
    parts = key.split(".")
    return any(".".join(parts[:n]).endswith(module) for n in range(1, len(parts)))


def _shape(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"
