"""The small networks of the arena: the digits' denoiser and judge."""

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

DIGITS = {"width": 32}


def digit_unet() -> UNet2DConditionModel:
    """Velocities of digits whose 28 x 28 pixels are folded to 4 x 14 x 14; the class is one token."""
    return UNet2DConditionModel(
        sample_size=14, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=DIGITS["width"], attention_head_dim=32, norm_num_groups=16,
    )  # fmt: skip


def block(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.SiLU(), nn.Conv2d(b, b, 3, 1, 1, groups=b),
                         nn.Conv2d(b, b, 1), nn.BatchNorm2d(b), nn.SiLU())  # fmt: skip


class DigitJudge(nn.Module):
    """Classifier of digits; its features ``[n, 64]`` separate writing styles."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(block(1, 24), block(24, 48), block(48, 96), nn.Flatten(), nn.Linear(96 * 16, 64))
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(64, 10))

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))
