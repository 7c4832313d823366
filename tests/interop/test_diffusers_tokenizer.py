"""The tokenizer as a folder for diffusers; compared with what diffusers makes of it where that is installed."""

import pytest
import torch
from safetensors.torch import load_file
from support import small_models

import vavae.torchvision_compat  # noqa: F401  (before diffusers)
from vavae.errors import UserError
from vavae.interop.diffusers_tokenizer import save_diffusers_tokenizer
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.models.tokenizer.config import TokenizerConfig
from vavae.storage.storage import Storage

CONFIGS = [
    TokenizerConfig(latent_dim=4, channels=32, channel_multipliers=(1, 2), res_blocks=1, attention_levels=(1,)),
    TokenizerConfig(latent_dim=3, channels=32, channel_multipliers=(1, 1, 2), attention_levels=(0, 2)),
    TokenizerConfig(
        latent_dim=4, channels=32, channel_multipliers=(1, 3, 1), res_blocks=1, attention_levels=(), norm_groups=4
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_diffusers_computes_the_same_moments_and_images(tmp_path, config):
    diffusers = pytest.importorskip("diffusers")
    autoencoder = small_models.randomized(VAVAE(config), scale=0.05)
    save_diffusers_tokenizer(str(tmp_path), autoencoder, image_size=16)
    theirs, report = diffusers.AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        ours, posterior = autoencoder.encode(images), theirs.encode(images).latent_dist
        torch.testing.assert_close(posterior.mean, ours.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(posterior.logvar, ours.logvar, rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs.decode(ours.mean).sample, autoencoder.decode(ours.mean), rtol=0, atol=1e-5)
    assert (theirs.config.scaling_factor, theirs.config.sample_size) == (1, 16)


def test_names_and_blocks_without_diffusers(tmp_path):
    autoencoder = small_models.randomized(VAVAE(CONFIGS[1]))
    storage = Storage(f"memory://{tmp_path.name}")
    save_diffusers_tokenizer(storage.url(), autoencoder, image_size=16)
    settings, tensors = (
        storage.read_json("config.json"),
        load_file(storage.local_file("diffusion_pytorch_model.safetensors")),
    )
    assert settings["down_block_types"] == ["AttnDownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
    assert settings["up_block_types"] == ["AttnUpDecoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"]
    assert settings["block_out_channels"] == [32, 32, 64]
    state = autoencoder.state_dict()
    assert len(tensors) == len(state)
    query = tensors["decoder.up_blocks.0.attentions.1.to_q.weight"]
    assert torch.equal(query, state["decoder.up.2.attn.1.q.weight"][:, :, 0, 0])
    shortcut = tensors["encoder.down_blocks.2.resnets.0.conv_shortcut.weight"]
    assert torch.equal(shortcut, state["encoder.down.2.block.0.nin_shortcut.weight"])


def test_an_architecture_that_diffusers_does_not_have_is_refused(tmp_path):
    config = TokenizerConfig(channels=32, channel_multipliers=(2, 1), attention_levels=())
    with pytest.raises(UserError, match=r"channel_multipliers starts with 2: .* so it starts with 1$"):
        save_diffusers_tokenizer(str(tmp_path / "new"), VAVAE(config), image_size=16)
    assert not (tmp_path / "new").exists()
