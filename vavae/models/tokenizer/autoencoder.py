"""The autoencoder of VA-VAE: encoder, posterior and decoder."""

from torch import Tensor, nn

from vavae.models.tokenizer.config import TokenizerConfig
from vavae.models.tokenizer.decoder import Decoder
from vavae.models.tokenizer.encoder import Encoder
from vavae.models.tokenizer.posterior import DiagonalGaussian


class VAVAE(nn.Module):
    """The autoencoder of VA-VAE, arXiv 2501.01423; parameters are named and initialized as in the released code.

    The moments are computed in the parameters' dtype and held in float32, so that half precision costs the posterior
    nothing.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_dim, 2 * config.latent_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(config.latent_dim, config.latent_dim, kernel_size=1)

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """The posterior of images [B, 3, H, W] in [-1, 1]; H and W are multiples of ``config.downsample``.

        Returns:
            Moments of shape [B, latent_dim, H/f, W/f], float32.
        """
        moments = self.quant_conv(self.encoder(images.to(self.quant_conv.weight.dtype)))
        mean, logvar = moments.float().chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar)

    def decode(self, z: Tensor) -> Tensor:
        """Images [B, 3, f·h, f·w], about [-1, 1] and not clamped, from latents [B, latent_dim, h, w]."""
        return self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype)))
