"""OmniRetriever-7B as published: LoRA, the fusion head and the BEATs bridge of WAVE-7B, one epoch, 256 clips a step.

    omni-jax train --config omniretriever_7b --workdir runs/omni7b \
        --config.model.base=wave7b --config.data.train=shards --config.evaluation.manifest=held_out.jsonl

`wave7b` is what `omni-jax convert to-jax` wrote, `shards` what `omni-jax prepare` wrote. As released, each of 8 micro-batches is its own
pool of 32 negatives, and hard negatives come from blocks of 8 clips. --config.losses.negatives=global makes one pool of 256 instead.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe of SPEC section 7."""
    return ml_collections.ConfigDict(
        {
            "model": {
                "base": "wave7b",
                "dtype": "bfloat16",
                "lora": {
                    "rank": 16,
                    "alpha": 32.0,
                    "dropout": 0.05,
                    "targets": ("decoder/layers/attn/q", "decoder/layers/attn/k", "decoder/layers/attn/v"),
                },
            },
            "data": {"train": "shards", "media_root": "", "preset": "training", "distinct": "caption", "workers": 8},
            "batch": {"micro_batch": 32, "micro_batches": 8, "blocks": 4},
            "losses": {
                "weights": {"tuple": 1.0, "distillation": 1.0, "pairwise": 1.0},
                "temperature": 0.01,
                "pairs": "cycle",
                "hard_scope": "local",
                "hn_audio_only": False,
                "negatives": "micro",
            },
            "optimizer": {
                "learning_rate": 1e-5,
                "warmup_ratio": 0.03,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.01,
                "clip_norm": 1.0,
            },
            "trainable": {"recipe": "adapter"},
            "mesh": {"data": 1, "fsdp": 0, "tensor": 1, "slices": 1},
            "remat": "layer",
            "seed": 2025,
            "steps": 0,
            "epochs": 1.0,
            "checkpoint": {"every": 250, "keep": 3},
            "evaluation": {"manifest": "", "media_root": "", "every": 500, "batch_size": 16},
            "log": {"every": 10},
            "stop": {"skipped_in_row": 10, "max_mean_cosine": 0.99, "min_effective_rank": 1.5, "collapse": "warn"},
        }
    )
