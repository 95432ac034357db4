"""A look at a clip while it is being made: latents to small pictures by the best linear map."""

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from skyrun.media.contact_sheet import contact_sheet, places
from skyrun.media.image import write_image
from skyrun.media.pixels import Frames
from skyrun.models.vae import LATENT_CHANNELS, WanVAE

_SIDE, _SAMPLES = 16, 8  # latents of a picture, pictures that the map is fitted to
_COARSE = 4  # their colours change over so many latents
_SCALE = 4  # pixels of a preview per latent


class Previewer:
    """Writes a picture after every step. The map is fitted once, to pictures that the autoencoder makes on the CPU."""

    def __init__(self, vae: Path, path: Path) -> None:
        self._vae, self._path = vae, path

    def write(self, latents: Tensor) -> None:
        """Latents [16, F, h, w], as clean as they are known. SkyrunError if the picture cannot be written."""
        chosen = [latents[:, place] for place in places(latents.shape[1])]
        write_image(self._path, contact_sheet([self.picture(frame.float().cpu()) for frame in chosen]))

    @torch.inference_mode()
    def picture(self, frame: Tensor) -> Frames:
        """Latents [16, h, w] -> uint8 [4 h, 4 w, 3]."""
        matrix, offset = self._map
        colours = torch.einsum("cl,lhw->chw", matrix, frame) + offset[:, None, None]
        large = F.interpolate(colours.unsqueeze(0), scale_factor=_SCALE, mode="bilinear").squeeze(0)
        levels: Frames = ((large / 2 + 0.5).clamp(0, 1) * 255).byte().permute(1, 2, 0).contiguous().numpy()
        return levels

    @cached_property
    @torch.inference_mode()
    def _map(self) -> tuple[Tensor, Tensor]:
        """Colours [3] of a latent [16]: least squares over smooth random latents and the mean of their pixels."""
        vae = WanVAE(self._vae, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        coarse = torch.randn(_SAMPLES, LATENT_CHANNELS, _SIDE // _COARSE, _SIDE // _COARSE, generator=generator)
        latents = F.interpolate(coarse, size=(_SIDE, _SIDE), mode="bilinear")
        pixels = torch.stack([next(vae.decode(sample.unsqueeze(1)))[:, 0] for sample in latents])
        means = F.avg_pool2d(pixels, 8)
        inputs = F.pad(latents.transpose(0, 1).flatten(1).T, (0, 1), value=1.0)
        solution = torch.linalg.lstsq(inputs, means.transpose(0, 1).flatten(1).T).solution
        return solution[:-1].T, solution[-1]
