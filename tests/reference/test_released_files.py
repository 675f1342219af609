"""torch itself saves the checkpoint as `.bin`, and loads what we write; transformers shows what becomes of a weight norm."""

from __future__ import annotations

import json

import numpy as np
import pytest

from omni_jax import conversion
from omni_jax.conversion.folder import copy_files, read_manifest
from omni_jax.conversion.source import open_checkpoint
from tests.conversion import checkpoints

pytestmark = pytest.mark.reference
TABLE = "relative_attention_bias"


def state_of(folder):
    """Returns the state dict of a folder's safetensors, its shared table as one tensor, as the model that saved it had it."""
    import torch
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    table = next((value for name, value in state.items() if TABLE in name), None)
    return {name: table if table is not None and TABLE in name else value for name, value in state.items()}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_golden_checkpoint_saved_by_torch_is_the_same_model(golden, tmp_path, zipped, shards):
    import torch

    checkpoint = open_checkpoint(golden.checkpoint)
    base = tmp_path / "base"
    base.mkdir()
    copy_files(checkpoint.folder, checkpoint.side_files, checkpoint.folder.__class__(base))
    state, placed = state_of(golden.checkpoint), {}
    for number in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        members = {name: state[name] for name in sorted(state)[number::shards]}
        torch.save(members, base / file, _use_new_zipfile_serialization=zipped)
        placed |= dict.fromkeys(members, file)
    if shards > 1:
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    conversion.to_jax(golden.checkpoint, tmp_path / "safe")
    conversion.to_jax(base, tmp_path / "model")
    assert read_manifest(tmp_path / "model").base_digest == read_manifest(tmp_path / "safe").base_digest
    conversion.to_torch(tmp_path / "model", base_out=tmp_path / "out")
    for mapped in (False, True):
        found: dict[str, torch.Tensor] = {}
        for file in sorted((tmp_path / "out").glob("*.bin")):
            loaded = torch.load(file, weights_only=True, mmap=mapped)
            assert len({value.untyped_storage().data_ptr() for name, value in loaded.items() if TABLE in name}) <= 1
            found |= loaded
        assert found.keys() == state.keys()
        for name, value in state.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_views_and_parameters_are_read_as_torch_has_them(tmp_path):
    import torch

    from omni_jax.io.torch_pickle import open_torch_weights

    whole = torch.arange(24, dtype=torch.bfloat16).reshape(4, 6)
    state = {"whole": whole, "turned": whole.T, "inner": whole[1:3, 2:], "own": torch.nn.Parameter(torch.randn(3)), "int": torch.arange(3)}
    for zipped in (True, False):
        torch.save(state, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
        placed = open_torch_weights(tmp_path / "x.bin")
        for name, tensor in state.items():
            expected = tensor.detach().double().numpy()
            assert np.array_equal(placed[name].read().astype(np.float64), expected), name


@pytest.mark.parametrize("style", ["weight_norm", "parametrizations"])
@pytest.mark.parametrize("names", ["old", "new"])
def test_the_page_beside_an_export_finds_a_weight_norm_that_from_pretrained_lost_and_mends_it(tmp_path, style, names):
    import torch
    import transformers

    class Config(transformers.PretrainedConfig):
        model_type = "toy_weight_norm"

    class Model(transformers.PreTrainedModel):
        config_class = Config
        base_model_prefix = "toy"

        def __init__(self, config):
            super().__init__(config)
            norm = torch.nn.utils.weight_norm if style == "weight_norm" else torch.nn.utils.parametrizations.weight_norm
            self.beats = torch.nn.Module()
            self.beats.encoder = torch.nn.Module()
            self.beats.encoder.pos_conv = torch.nn.Sequential(norm(torch.nn.Conv1d(24, 24, 8, groups=4), name="weight", dim=2))
            self.post_init()

        def _init_weights(self, module):
            pass

    base = checkpoints.write_base(tmp_path / "base", checkpoints.tensors(checkpoints.model_config(), dtype=np.float32), shards=1)
    from tests.conversion.test_round_trip import beats_file

    beats_file(base / "BEATs.pt")
    conversion.to_jax(base, tmp_path / "model")
    conversion.to_torch(tmp_path / "model", base_out=tmp_path / "out", weight_norm=names)
    (tmp_path / "out" / "config.json").write_text(json.dumps({"model_type": "toy_weight_norm"}))
    model = Model.from_pretrained(tmp_path / "out")
    check, mend = ((tmp_path / "out" / "README.omni_jax.md").read_text().split("```python\n")[part].split("```")[0] for part in (1, 2))
    check = check.replace("model.safetensors", str(tmp_path / "out" / "model.safetensors"))
    space = {"model": model}
    if style == "weight_norm" and names == "new":  # as the page's table says of this version of transformers
        with pytest.raises(AssertionError):
            exec(check, space)
        exec(mend, space)
    exec(check, space)
