"""Options of the TPU compiler by kind of chip, and the programs that are compiled with them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, Mesh

from omni_jax.model.runner import Runner
from omni_jax.parallel import compiler, compiler_options, make_mesh
from omni_jax.tokens.buckets import Planner
from omni_jax.train import TrainStep
from tests.model import batches, builders
from tests.train.random_batches import MODEL, batch, recipe, weights


def mesh(kind: str) -> AbstractMesh:
    return AbstractMesh((4,), ("fsdp",), abstract_device=AbstractDevice(kind, None, "tpu"))


def test_the_large_products_of_v6e_get_more_of_the_chips_memory():
    assert int(compiler_options(mesh("TPU v6 lite"))["xla_tpu_scoped_vmem_limit_kib"]) > 32768  # the compiler's own limit


@pytest.mark.parametrize("where", [None, make_mesh(fsdp=2, devices=jax.devices()[:2]), AbstractMesh((2,), ("fsdp",)), mesh("TPU v5 lite")])
def test_other_devices_need_no_options(where: Mesh | AbstractMesh | None):
    assert compiler_options(where) == {}


def test_what_the_user_says_of_an_option_holds(monkeypatch: pytest.MonkeyPatch):
    usual = compiler_options(mesh("TPU v6 lite"))
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_other=1 --xla_tpu_scoped_vmem_limit_kib=98304")
    assert usual.keys() - compiler_options(mesh("TPU v6 lite")).keys() == {"xla_tpu_scoped_vmem_limit_kib"}


@pytest.mark.jit
def test_embedding_and_training_are_compiled_with_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiler, "_OPTIONS", {"cpu": {"xla_no_such_option": "1"}})
    runner = Runner(builders.random_encoder(builders.EVEN, host=True)[0])
    embedding = runner.lower(batches.plan(builders.EVEN, batches.clips(builders.EVEN), Planner()))
    step = TrainStep(MODEL, recipe(), dtype=jnp.float32)
    training = step.lower(*step.init(weights()), batch(recipe().losses))
    assert embedding.keys() == {"vision", "audio", "beats", "rows"}
    for lowered in (*embedding.values(), training):
        with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
            lowered.compile()
