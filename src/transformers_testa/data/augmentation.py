"""Random augmentation of a training video: one crop, one flip and one RandAugment draw for all its frames."""

from dataclasses import dataclass

import torch
from torchvision.transforms import v2


_NUM_MAGNITUDES = 31


class _RandAugment(v2.RandAugment):
    """RandAugment without the operations that would turn a colour which a caption names into another."""

    _AUGMENTATION_SPACE = {
        name: magnitudes
        for name, magnitudes in v2.RandAugment._AUGMENTATION_SPACE.items()
        if name not in ("Color", "Posterize", "Solarize")
    }


@dataclass(frozen=True)
class VideoAugmentation:
    """A square crop, a horizontal flip and RandAugment, the same for all frames of a video.

    Args:
        size: Height and width of the crop.
        flip: Mirror every second video. Not for texts that tell left from right.
        num_ops: RandAugment operations in a row; 0 for none.
        magnitude: Their strength, 0 to 30.

    Raises:
        ValueError: `size` or `num_ops` is too small, or `magnitude` is not between 0 and 30.
    """

    size: int
    flip: bool = True
    num_ops: int = 2
    magnitude: int = 15

    def __post_init__(self) -> None:
        if self.size < 1 or self.num_ops < 0:
            raise ValueError(f"size is {self.size} and num_ops {self.num_ops}; at least 1 and 0 are needed.")
        if not 0 <= self.magnitude < _NUM_MAGNITUDES:
            raise ValueError(f"magnitude is {self.magnitude}; 0 to {_NUM_MAGNITUDES - 1} is needed.")

    def __call__(self, frames: torch.Tensor, seed: int) -> torch.Tensor:
        """Augment one video.

        Args:
            frames: uint8 `[T, C, H, W]`, at least `size` high and wide.
            seed: Decides everything that is drawn; torch's global generator is left as it was.

        Returns:
            uint8 `[T, C, size, size]`.

        Raises:
            ValueError: The frames are smaller than the crop.
        """
        height, width = frames.shape[-2:]
        if min(height, width) < self.size:
            raise ValueError(
                f"Frames of {height} x {width} pixels are smaller than the crop of {self.size} x {self.size}; give the "
                "video processor a larger size."
            )
        transform = v2.Compose(
            [
                v2.RandomCrop(self.size),
                v2.RandomHorizontalFlip(p=0.5 if self.flip else 0.0),
                _RandAugment(self.num_ops, self.magnitude, _NUM_MAGNITUDES, fill=128),
            ]
        )
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the generators of all other devices too.
            torch.default_generator.manual_seed(seed)
            return transform(frames)
