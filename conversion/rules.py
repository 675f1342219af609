"""Which torch tensor is which leaf of the parameter tree: the whole correspondence as data.

A rule names a torch pattern, a tree path and a transform; `{layer}` in the pattern stands for the layer number, and the leaf then has a
leading layer axis. The engine derives both directions from these tables. Names are those of `wave7b_manifest.json` (SPEC section 1).
"""

from __future__ import annotations

import dataclasses

from omni_jax.config import BeatsConfig, ModelConfig, VisionConfig
from omni_jax.conversion.transforms import Identity, KeepAxis, PatchKernel, ReverseAxes, Transform

TreePath = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of the correspondence.

    Attributes:
      torch: name of the torch tensor; `{layer}` where it is repeated per layer.
      path: leaf of the parameter tree.
      transform: torch -> tree.
      shared: the leaf has no layer axis: every layer that stores the tensor stores the same values.
      linear: the leaf is the kernel of a linear map, which may carry LoRA.
    """

    torch: str
    path: TreePath
    transform: Transform
    shared: bool = False
    linear: bool = False

    @property
    def module(self) -> str:
        """Path of the layer the leaf belongs to, as `LoraConfig.targets` names it: decoder/layers/attn/q."""
        return "/".join(self.path[:-1])


def base_rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Returns the rules of a checkpoint, in the order of the tree; BEATs and the fusion head where the configuration has them."""
    beats = (*beats_rules(config.beats), *BRIDGE) if config.beats else ()
    return (*DECODER, *vision_rules(config.vision), *AUDIO, *beats, *(HEAD if config.has_head else ()))


def lora_rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Returns the rules of an adapter's LoRA matrices, named as PEFT saves them; none without `config.lora`."""
    targets = config.lora.targets if config.lora else ()
    return tuple(
        Rule(
            f"{PEFT_PREFIX}{rule.torch.removesuffix('weight')}lora_{side}.weight", (*rule.path[:-1], f"lora_{side.lower()}"), ReverseAxes()
        )
        for rule in base_rules(config)
        if rule.linear and rule.module in targets
        for side in "AB"
    )


def _linear(torch: str, path: str, bias: bool = True) -> tuple[Rule, ...]:
    tree = tuple(path.split("/"))
    kernel = Rule(f"{torch}.weight", (*tree, "kernel"), ReverseAxes(), linear=True)
    return (kernel, Rule(f"{torch}.bias", (*tree, "bias"), Identity())) if bias else (kernel,)


def _norm(torch: str, path: str, bias: bool = True) -> tuple[Rule, ...]:
    tree = tuple(path.split("/"))
    scale = Rule(f"{torch}.weight", (*tree, "scale"), Identity())
    return (scale, Rule(f"{torch}.bias", (*tree, "bias"), Identity())) if bias else (scale,)


def _embedding(torch: str, path: str, shared: bool = False) -> tuple[Rule, ...]:
    return (Rule(f"{torch}.weight", (*path.split("/"), "embedding"), Identity(), shared),)


def _conv(torch: str, path: str) -> tuple[Rule, ...]:
    # Differs from a linear layer only in rank, which ReverseAxes takes as it comes, and in that it carries no LoRA.
    return tuple(dataclasses.replace(rule, linear=False) for rule in _linear(torch, path))


THINKER_PREFIX = "thinker."
"""What precedes the names of the thinker in a full Qwen2.5-Omni checkpoint."""

DROPPED_PREFIXES = ("talker.", "token2wav.")
"""The parts of a full Qwen2.5-Omni checkpoint that speak: no embedding depends on them, and they are left out."""

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before every name of the model it wraps."""

DECODER = (
    *_embedding("model.embed_tokens", "decoder/embed"),
    *_linear("model.layers.{layer}.self_attn.q_proj", "decoder/layers/attn/q"),
    *_linear("model.layers.{layer}.self_attn.k_proj", "decoder/layers/attn/k"),
    *_linear("model.layers.{layer}.self_attn.v_proj", "decoder/layers/attn/v"),
    *_linear("model.layers.{layer}.self_attn.o_proj", "decoder/layers/attn/o", bias=False),
    *_linear("model.layers.{layer}.mlp.gate_proj", "decoder/layers/mlp/gate", bias=False),
    *_linear("model.layers.{layer}.mlp.up_proj", "decoder/layers/mlp/up", bias=False),
    *_linear("model.layers.{layer}.mlp.down_proj", "decoder/layers/mlp/down", bias=False),
    *_norm("model.layers.{layer}.input_layernorm", "decoder/layers/norm_attn", bias=False),
    *_norm("model.layers.{layer}.post_attention_layernorm", "decoder/layers/norm_mlp", bias=False),
    *_norm("model.norm", "decoder/norm", bias=False),
    Rule("lm_head.weight", ("lm_head", "kernel"), ReverseAxes()),  # carried, not computed with: no LoRA
)

AUDIO = (
    *_conv("audio_tower.conv1", "audio/conv1"),
    *_conv("audio_tower.conv2", "audio/conv2"),
    *_embedding("audio_tower.audio_bos_eos_token", "audio/bos_eos"),
    *_norm("audio_tower.layers.{layer}.self_attn_layer_norm", "audio/layers/norm1"),
    *_linear("audio_tower.layers.{layer}.self_attn.q_proj", "audio/layers/attn/q"),
    *_linear("audio_tower.layers.{layer}.self_attn.k_proj", "audio/layers/attn/k", bias=False),
    *_linear("audio_tower.layers.{layer}.self_attn.v_proj", "audio/layers/attn/v"),
    *_linear("audio_tower.layers.{layer}.self_attn.out_proj", "audio/layers/attn/out"),
    *_norm("audio_tower.layers.{layer}.final_layer_norm", "audio/layers/norm2"),
    *_linear("audio_tower.layers.{layer}.fc1", "audio/layers/fc1"),
    *_linear("audio_tower.layers.{layer}.fc2", "audio/layers/fc2"),
    *_norm("audio_tower.ln_post", "audio/norm"),
    *_linear("audio_tower.proj", "audio/proj"),
)

BRIDGE = (
    *_norm("beats_ln", "bridge/norm"),
    *_linear("beats_proj.0", "bridge/fc1"),
    *_linear("beats_proj.2", "bridge/fc2"),
)

HEAD = (
    *_linear("classify_linear.0", "head/fc1"),
    *_linear("classify_linear.2", "head/fc2"),
)


def vision_rules(config: VisionConfig) -> tuple[Rule, ...]:
    """Returns the rules of the vision tower."""
    patch = PatchKernel((config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size))
    block = "visual.blocks.{layer}"
    return (
        Rule("visual.patch_embed.proj.weight", ("vision", "patch_embed", "kernel"), patch),
        *_norm(f"{block}.norm1", "vision/layers/norm1", bias=False),
        *_norm(f"{block}.norm2", "vision/layers/norm2", bias=False),
        *_linear(f"{block}.attn.q", "vision/layers/attn/q"),
        *_linear(f"{block}.attn.k", "vision/layers/attn/k"),
        *_linear(f"{block}.attn.v", "vision/layers/attn/v"),
        *_linear(f"{block}.attn.proj", "vision/layers/attn/proj"),
        *_linear(f"{block}.mlp.gate_proj", "vision/layers/mlp/gate"),
        *_linear(f"{block}.mlp.up_proj", "vision/layers/mlp/up"),
        *_linear(f"{block}.mlp.down_proj", "vision/layers/mlp/down"),
        *_norm("visual.merger.ln_q", "vision/merger/norm", bias=False),
        *_linear("visual.merger.mlp.0", "vision/merger/fc1"),
        *_linear("visual.merger.mlp.2", "vision/merger/fc2"),
    )


def beats_rules(config: BeatsConfig) -> tuple[Rule, ...]:
    """Returns the rules of BEATs, with the parts that some checkpoints lack only where `config` has them."""
    layer, patch = "beats.encoder.layers.{layer}", PatchKernel((1, config.patch_size, config.patch_size))
    return (
        Rule("beats.patch_embedding.weight", ("beats", "patch_embed", "kernel"), patch),
        *((Rule("beats.patch_embedding.bias", ("beats", "patch_embed", "bias"), Identity()),) if config.conv_bias else ()),
        *_norm("beats.layer_norm", "beats/norm_patches"),
        *(_linear("beats.post_extract_proj", "beats/input_proj") if config.has_input_projection else ()),
        Rule("beats.encoder.pos_conv.0.weight_v", ("beats", "pos_conv", "v"), ReverseAxes()),
        Rule("beats.encoder.pos_conv.0.weight_g", ("beats", "pos_conv", "g"), KeepAxis(3, 2)),
        Rule("beats.encoder.pos_conv.0.bias", ("beats", "pos_conv", "bias"), Identity()),
        *_norm("beats.encoder.layer_norm", "beats/norm"),
        *_embedding(f"{layer}.self_attn.relative_attention_bias", "beats/relative_bias", shared=True),
        *_linear(f"{layer}.self_attn.q_proj", "beats/layers/attn/q"),
        *_linear(f"{layer}.self_attn.k_proj", "beats/layers/attn/k"),
        *_linear(f"{layer}.self_attn.v_proj", "beats/layers/attn/v"),
        *_linear(f"{layer}.self_attn.out_proj", "beats/layers/attn/out"),
        *_linear(f"{layer}.self_attn.grep_linear", "beats/layers/attn/gate"),
        Rule(f"{layer}.self_attn.grep_a", ("beats", "layers", "attn", "gate_scale"), KeepAxis(4, 1)),
        *_norm(f"{layer}.self_attn_layer_norm", "beats/layers/norm1"),
        *_linear(f"{layer}.fc1", "beats/layers/fc1"),
        *_linear(f"{layer}.fc2", "beats/layers/fc2"),
        *_norm(f"{layer}.final_layer_norm", "beats/layers/norm2"),
        *(_linear("beats.predictor", "beats/predictor") if config.predictor_classes else ()),
    )
