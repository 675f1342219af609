"""A model of 135 thousand parameters for `omni-jax ablate`: one run takes seconds of one core.

    omni-jax ablate --arms L_A,L_A+L_D,L_A+L_T,all --seeds 5 --out ablation

Without `data.train`, `omni-jax ablate` makes clips of its own (`omni_jax.data.synthetic_parts`): 0.2 s of sound, 28 x 84 pixels.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe."""
    width = 32
    tower = {"hidden_size": width, "intermediate_size": 32, "num_layers": 1, "num_heads": 2}
    return ml_collections.ConfigDict(
        {
            "model": {
                "dtype": "float32",
                "architecture": {
                    "decoder": {**tower, "num_layers": 2, "num_kv_heads": 1, "mrope_sections": (2, 3, 3)},
                    "vision": {**tower, "full_attention_layers": (0,)},
                    "audio": {**tower, "n_window": 10},
                    "beats": {
                        **tower,
                        "embed_dim": width,
                        "conv_pos": 4,
                        "conv_pos_groups": 2,
                        "num_buckets": 16,
                        "max_distance": 32,
                        "predictor_classes": 0,
                    },
                },
            },
            "data": {
                "train": "synthetic",
                "preset_fields": {"frames": 2, "pixels": 2352, "audio_seconds": 0.2, "filler": ""},
                "distinct": "none",
                "workers": 0,
                "augment": {"audio": False},
            },
            "batch": {"micro_batch": 16, "row_multiple": 4},
            "losses": {
                "weights": {"tuple": 1.0, "distillation": 1.0, "pairwise": 1.0},
                "temperature": 0.07,
                "pairs": "all",
                "hard_scope": "global",
                "negatives": "global",
            },
            "optimizer": {"learning_rate": 2e-3, "warmup_steps": 20, "final_fraction": 0.02, "b1": 0.9, "b2": 0.98, "weight_decay": 0.02},
            "trainable": {"recipe": "all"},
            "mesh": {"fsdp": 1},
            "remat": "none",
            "seed": 0,
            "steps": 400,
            "checkpoint": {"every": 100, "keep": 1},
            "evaluation": {"batch_size": 32},
            "log": {"every": 1},
        }
    )
