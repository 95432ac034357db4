"""Draw previews of an unfinished clip: a linear map turns latents into small images, without the autoencoder."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from skyrun.media.contact_sheet import contact_sheet, places
from skyrun.media.pixels import Frames

RGBMap = Sequence[Sequence[float]]  # red, green and blue in [-1, 1] per latent channel; the last row is the offset

# The published map for normalized latents of Wan 2.1's autoencoder, which all models here share.
WAN_RGB_MAP: RGBMap = (
    (-0.1299, -0.1692, 0.2932),
    (0.0671, 0.0406, 0.0442),
    (0.3568, 0.2548, 0.1747),
    (0.0372, 0.2344, 0.1420),
    (0.0313, 0.0189, -0.0328),
    (0.0296, -0.0956, -0.0665),
    (-0.3477, -0.4059, -0.2925),
    (0.0166, 0.1902, 0.1975),
    (-0.0412, 0.0267, -0.1364),
    (-0.1293, 0.0740, 0.1636),
    (0.0680, 0.3019, 0.1128),
    (0.0032, 0.0581, 0.0639),
    (-0.1251, 0.0927, 0.1699),
    (0.0060, -0.0633, 0.0005),
    (0.3477, 0.2275, 0.2950),
    (0.1984, 0.0913, 0.1861),
    (-0.1835, -0.0868, -0.3360),
)
_SCALE = 4  # pixels of a preview per latent


def preview_image(latents: Tensor, rgb_map: RGBMap = WAN_RGB_MAP) -> Image.Image:
    """Draw the predicted x0, latents [16, F, h, w], as a sheet of some of its frames."""
    chosen = [latents[:, place] for place in places(latents.shape[1])]
    return contact_sheet([preview_frame(frame.float().cpu(), rgb_map) for frame in chosen])


def preview_frames(latents: Tensor, rgb_map: RGBMap = WAN_RGB_MAP) -> list[Image.Image]:
    """Draw every frame of the predicted x0, latents [16, F, h, w]."""
    return [Image.fromarray(preview_frame(frame, rgb_map)) for frame in latents.float().cpu().unbind(1)]


def preview_frame(frame: Tensor, rgb_map: RGBMap = WAN_RGB_MAP) -> Frames:
    """Latents [16, h, w] -> uint8 [4 h, 4 w, 3]."""
    table = torch.tensor(rgb_map)
    colors = torch.einsum("lc,lhw->chw", table[:-1], frame) + table[-1][:, None, None]
    large = F.interpolate(colors.unsqueeze(0), scale_factor=_SCALE, mode="bilinear").squeeze(0)
    levels: Frames = ((large / 2 + 0.5).clamp(0, 1) * 255).byte().permute(1, 2, 0).contiguous().numpy()
    return levels
