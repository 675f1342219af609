"""A model of about a million parameters, trained from scratch in float32 on two CPU cores.

Clips are a second long, so that a chunk of log-mel is: `n_window` is half of the published one. Prompts of one medium have no filler.

    omni-jax train --config tiny --workdir runs/tiny \
        --config.data.train=demo_out/shards --config.evaluation.manifest=demo_out/clips/held_out.jsonl

`tiny:quick` is what `make demo` runs: towers of one layer, a decoder of two, a higher learning rate, and one kind of
step, whose hard negatives exchange the sound: one program is compiled instead of three.
"""

import ml_collections

from omni_jax.config import ConfigError

QUICK = {
    "model": {
        "architecture": {
            "decoder": {"num_layers": 2},
            "vision": {"num_layers": 1, "full_attention_layers": (0,)},
            "audio": {"num_layers": 1},
            "beats": {"num_layers": 1},
        }
    },
    "losses": {"hn_audio_only": True},
    "optimizer": {"learning_rate": 3e-3, "warmup_steps": 25},
    "steps": 480,
}


def get_config(recipe: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe, "quick" for the shorter one."""
    if recipe not in ("", "quick"):
        raise ConfigError(f"tiny:{recipe}: write tiny, or tiny:quick")
    config = _full()
    if recipe:
        config.update(QUICK)
    return config


def _full() -> ml_collections.ConfigDict:
    width = 96
    tower = {"hidden_size": width, "intermediate_size": 192, "num_layers": 2, "num_heads": 4}
    return ml_collections.ConfigDict(
        {
            "model": {
                "dtype": "float32",
                # Sections as in `ModelConfig`; vocabulary and control tokens come from the tokenizer that is made with the weights.
                "architecture": {
                    "decoder": {**tower, "intermediate_size": 256, "num_layers": 3, "num_kv_heads": 2, "mrope_sections": (4, 4, 4)},
                    "vision": {**tower, "output_size": width, "full_attention_layers": (1,)},
                    "audio": {**tower, "output_size": width, "n_window": 50},
                    "beats": {**tower, "embed_dim": width, "conv_pos": 16, "conv_pos_groups": 4, "num_buckets": 32, "max_distance": 128},
                },
                "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.0},
            },
            "data": {
                "train": "demo_out/shards",
                "preset_fields": {"frames": 4, "pixels": 3136, "audio_seconds": 1.0, "filler": ""},
                "distinct": "id_prefix",
                "workers": 1,
            },
            "batch": {"micro_batch": 48, "row_multiple": 4},
            "losses": {
                "weights": {"tuple": 1.0, "distillation": 1.0, "pairwise": 1.0},
                "temperature": 0.05,
                "pairs": "all",
                "hard_scope": "global",
                "negatives": "global",
            },
            "optimizer": {"learning_rate": 2e-3, "warmup_steps": 40, "final_fraction": 0.02, "b1": 0.9, "b2": 0.98, "weight_decay": 0.02},
            "trainable": {"recipe": "all"},
            "remat": "none",
            "seed": 0,
            "steps": 400,
            "checkpoint": {"every": 40, "keep": 2},
            "evaluation": {"batch_size": 32},
            "log": {"every": 1},
        }
    )
