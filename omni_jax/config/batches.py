"""Sections of a run's config that the training data read, too."""

from __future__ import annotations

import dataclasses

from omni_jax.config.errors import ConfigError, check_fields


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Which parts of the augmented copy are changed (SPEC section 6).

    Attributes:
      video: flip, brightness, contrast and saturation.
      audio: gain, noise, speed and circular shift.
      text: dropped and swapped words.
    """

    video: bool = True
    audio: bool = True
    text: bool = True


AUGMENT = AugmentConfig()


@dataclasses.dataclass(frozen=True)
class BatchSection:
    """Clips of a step: `micro_batches` of `micro_batch` clips, all processes together.

    Attributes:
      micro_batch: clips that are encoded together, over all processes.
      micro_batches: micro-batches of one step.
      blocks: parts of a micro-batch within which features are exchanged (the release has one a device); each process holds whole ones.
      row_multiple: row lengths are multiples of so many tokens.
    """

    micro_batch: int
    micro_batches: int = 1
    blocks: int = 1
    row_multiple: int = 8

    def __post_init__(self) -> None:
        sizes = "micro_batch micro_batches blocks row_multiple"
        check_fields(self, "config field batch.", sizes, lambda value: value >= 1, "must be at least 1")
        if self.micro_batch % self.blocks:
            raise ConfigError(f"config field batch.blocks={self.blocks}: must divide batch.micro_batch={self.micro_batch}")

    @property
    def clips(self) -> int:
        """Clips of a step."""
        return self.micro_batch * self.micro_batches
