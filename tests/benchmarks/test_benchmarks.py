"""The benchmarks' own arithmetic, and one pass of the 7B script at a tiny size. No time is asserted."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.conversion.engine import tree_shapes
from omni_jax.model import abstract_params
from omni_jax.model.runner import Runner
from omni_jax.tokens.batching import Planner
from omni_jax.towers.vision import step_layout
from tests.golden_set import manifest_7b
from tests.tolerances import assert_close
from tools.benchmarks import __main__ as command
from tools.benchmarks import encoder_7b, mid_size, train_mid
from tools.benchmarks.forward_work import forward_work, total
from tools.benchmarks.timing import Pairs, interleave

TINY = {"grid": (2, 4, 6), "seconds": 2}


def test_ratio_is_the_median_over_pairs() -> None:
    pairs = Pairs(ours=(1.0, 2.0, 4.0), theirs=(2.0, 2.0, 2.0), first_ours=9.0, first_theirs=9.0)
    assert pairs.ratio == 1.0
    assert pairs.seconds == (2.0, 2.0)
    assert Pairs((1.0, 2.0, 1.0), (3.0, 2.0, 5.0), 0.0, 0.0).ratio == 3.0


def test_sides_take_turns() -> None:
    calls: list[str] = []
    pairs = interleave(lambda: calls.append("ours"), lambda: calls.append("theirs"), pairs=3)
    assert calls == ["ours", "theirs"] * 2 + ["theirs", "ours"] + ["ours", "theirs"]
    assert len(pairs.ours) == len(pairs.theirs) == 3


def test_command_writes_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, object] = {}

    class Module:
        @staticmethod
        def run(**options: object) -> dict[str, float]:
            asked.update(options)
            return {"ratio": 1.5}

    monkeypatch.setattr(command.importlib, "import_module", lambda name: Module)
    monkeypatch.setattr(command.os, "sched_setaffinity", lambda *_: None, raising=False)
    command.main(["--only", "encoder_mid", "--pairs", "7", "--json", str(tmp_path / "out.json")])
    assert asked == {"pairs": 7}
    assert json.loads((tmp_path / "out.json").read_text()) == {"encoder_mid": {"ratio": 1.5}}
    with pytest.raises(SystemExit):
        command.main(["--only", "nonsense"])


def test_mid_size_settings_are_mid_size() -> None:
    leaves = abstract_params(mid_size.mid_config())
    used = sum(int(np.prod(x.shape)) for x in leaves.values())
    assert 0.1e9 <= used <= 0.2e9


def test_mid_size_clips_have_the_shapes_of_the_training_preset() -> None:
    config = mid_size.mid_config()
    clips = mid_size.synthetic_clips(config, 2)
    prompts = mid_size.sequences(clips, ("tva", "video"), config)
    for clip, found in zip(clips, prompts, strict=True):
        assert clip.vision is not None
        assert clip.vision.patches.shape == (4 * 216, 1176)
        caption = int(clip.record.text or 0)
        assert len(found["tva"].ids) == 216 + 400 + 4 + caption + 1
        assert len(found["video"].ids) == 216 + 2 + 5 + 1
    batch = mid_size.batch(clips, ("tva",), config, Planner())
    assert [v.patches.shape[1] for v in batch.vision] == [224]
    assert 0 < total(forward_work(config, batch)).padding < 0.25


@pytest.mark.jit
def test_checkpoint_weights_bear_the_names_of_a_checkpoint() -> None:
    config = encoder_7b.shape_7b(layers=2, width=128)
    weights = mid_size.checkpoint_weights(mid_size.random_encoder(config))
    assert weights["model.layers.1.mlp.gate_proj.weight"].shape == (config.decoder.intermediate_size, 128)
    assert weights["beats.encoder.pos_conv.0.weight_v"].shape == (128, 8, 128)
    assert all(np.abs(w).max() > 0 for w in weights.values())


def test_full_shape_is_that_of_the_manifest() -> None:
    """Shapes alone: nothing is allocated."""
    shapes = tree_shapes(encoder_7b.shape_7b())
    shared = 11 * 320 * 12  # the relative-attention table, once in the tree and twelve times in the manifest
    assert sum(int(np.prod(s)) for s in shapes.values()) == sum(int(np.prod(s)) for s in manifest_7b("wave7b").values()) - shared


@pytest.mark.jit
def test_weights_made_on_the_device_are_random_in_the_asked_dtype() -> None:
    encoder = encoder_7b.random_weights(encoder_7b.shape_7b(layers=2, width=128), jnp.bfloat16)
    kernel = encoder.decoder.layers.mlp.gate.kernel[...]
    assert kernel.dtype == jnp.bfloat16
    values = np.asarray(kernel, np.float32)
    assert abs(values.mean()) < 1e-3
    assert values.std() == pytest.approx(0.02, rel=0.05)
    assert np.unique(values[0]).size > 1000
    assert (np.asarray(encoder.decoder.norm.scale[...], np.float32) == 1).all()


def test_full_batch_is_laid_out_as_the_token_rooms_do() -> None:
    config = encoder_7b.shape_7b(layers=2, width=128)
    batch = encoder_7b.full_batch(config, 2)
    coords, window = step_layout(12, 18, 2, config.vision.window_tokens)
    assert (batch.vision[0].coords == coords).all()
    # Windows may bear other numbers; which patches share one is what counts.
    ours = batch.vision[0].window[0]
    assert ((ours[:, None] == ours) == (window[:, None] == window)).all()
    media = batch.rows[0].media_index
    assert sorted(media[media >= 0].tolist()) == list(range(2 * (216 + 400)))
    assert batch.rows[0].ids.shape == (2, 640)


@pytest.mark.jit
def test_seven_b_forward_equals_the_runner() -> None:
    encoder = mid_size.random_encoder(encoder_7b.shape_7b(layers=2, width=128))
    batch = encoder_7b.full_batch(encoder.config, 2, **TINY)
    call, facts = encoder_7b.jax_forward(encoder, batch)
    rows = [row for _, _, row in sorted(Runner(encoder).embed(batch), key=lambda found: found[0])]
    assert_close(call(), np.stack(rows), "encoder")
    assert facts["compile_seconds"] > 0


@pytest.mark.jit
def test_seven_b_script_runs_at_a_tiny_size(capsys: pytest.CaptureFixture[str]) -> None:
    results = encoder_7b.run([2], layers=2, width=128, pairs=1, with_torch=False, **TINY)
    assert set(results["batches"]) == {2}
    assert all(f["clips_per_second"] > 0 and f["torch_seconds"] is None for f in results["batches"].values())
    assert results["device"] in capsys.readouterr().out.splitlines()[-1]


def test_peaks_are_found_by_device_kind() -> None:
    assert encoder_7b.peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert encoder_7b.peak_tflops("NVIDIA H100 PCIe") == 756
    assert encoder_7b.peak_tflops("TPU v5 lite") == 197
    assert encoder_7b.peak_tflops("TPU v5p") == 459
    assert encoder_7b.peak_tflops("TPU v6 lite") == 918
    assert encoder_7b.peak_tflops("cpu") is None


@pytest.mark.reference
def test_torch_modules_compute_the_same() -> None:
    import torch

    from tools.benchmarks.torch_encoder import TorchEncoder, load

    encoder = mid_size.random_encoder(encoder_7b.shape_7b(layers=2, width=128))
    batch = encoder_7b.full_batch(encoder.config, 2, **TINY)
    beside = TorchEncoder(encoder.config).eval()
    load(beside, mid_size.checkpoint_weights(encoder))
    assert next(beside.parameters()).dtype == torch.float32
    assert_close(encoder_7b.jax_forward(encoder, batch)[0](), encoder_7b.torch_forward(beside, batch)(), "encoder")


@pytest.mark.reference
def test_thinker_computes_the_same() -> None:
    """The mid-size benchmark at a tiny size: it compares all seven tables before it times anything."""
    from tools.benchmarks import encoder_mid

    config = encoder_7b.shape_7b(layers=2, width=128)
    results = encoder_mid.run(pairs=1, config=config, batch=2, grid=(2, 4, 6), mel_frames=200)
    assert results["difference"] < encoder_mid.LARGEST_DIFFERENCE
    assert {"tva_batch_1", "tva_batch_2", "seven_tables", "seven_tables_towers_kept"} < set(results)


@pytest.mark.reference
def test_training_is_the_same_in_torch_with_an_adapter_that_peft_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training benchmark at a tiny size, which compares losses; then PEFT loads what was trained, and embeds the same."""
    from omni_jax.towers import NAMES
    from tests.train.random_batches import QUICK

    made: list[train_mid.Ours] = []

    class Quick(train_mid.Ours):
        def __init__(self, *given: Any):
            super().__init__(*given, compiler_options=QUICK)
            made.append(self)

    monkeypatch.setattr(train_mid, "Ours", Quick)
    config = encoder_7b.shape_7b(layers=2, width=128)
    sizes = {"grid": (2, 4, 6), "mel_frames": 200}
    results = train_mid.run(pairs=1, config=config, clips=2, memory=False, **sizes)
    assert len(results["losses"]) == 6 and results["loss_difference"] < train_mid.LARGEST_DIFFERENCE
    assert results["operations_ratio"] > 1

    (ours,) = made
    encoder = mid_size.random_encoder(train_mid.adapted(config))
    initial = train_mid.leaves(encoder)
    trained = {tuple(name.split("/")): np.asarray(x) for name, x in ours.state.trainable.items()}
    assert all(not np.array_equal(leaf, initial[path]) for path, leaf in trained.items())
    theirs = train_mid.Theirs(encoder, ours.material, trained)
    batch = jax.tree.map(lambda x: x[0], ours.batch(1))
    (kind,) = batch.kinds

    @functools.partial(jax.jit, compiler_options=QUICK)
    def embed(trainable: Any, frozen: Any, batch: Any) -> Any:
        kept = ours.step.forward.keep(trainable, frozen, batch, kind)
        assert set(kept) == set(NAMES)
        return ours.step.forward.embed(trainable, frozen, batch, kept, kind, None, hard=True)

    found, expected = embed(ours.state.trainable, ours.frozen, batch), theirs.trainer.embeddings(1, *theirs.inputs(1))
    for name in ("anchor", "positive", "hard", "text", "video"):
        assert_close(found[name], expected[name].detach().numpy(), "encoder")


@pytest.mark.jit
def test_peak_memory_is_that_of_the_call() -> None:
    import ctypes

    size = 64 << 20
    before = train_mid.peak_of(lambda: None)
    assert train_mid.peak_of(lambda: ctypes.memset(ctypes.create_string_buffer(size), 1, size)) >= before + size * 0.9
