"""Modules that are built for a checkpoint: nothing is drawn, and nothing is left that it would not set."""

import pytest
import torch
from torch import nn

from vavae.losses.adversarial import DiscriminatorObjective
from vavae.losses.config import AdversarialLossConfig
from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.model import LightningDiT
from vavae.models.tokenizer.autoencoder import VAVAE
from vavae.models.tokenizer.config import TokenizerConfig
from vavae.training.initialize import initialized, uninitialized

_CPU = torch.device("cpu")
_BUILDS = {
    "tokenizer": lambda: VAVAE(TokenizerConfig(channels=32, channel_multipliers=(1, 1), attention_levels=(1,))),
    "discriminator": lambda: DiscriminatorObjective(AdversarialLossConfig(channels=32, layers=1, norm="batch")),
    "lightningdit": lambda: LightningDiT(
        LightningDiTConfig(size=None, depth=1, width=32, heads=2).with_classes(3), latent_dim=4, grid=4
    ),
}


@pytest.mark.parametrize("name", _BUILDS)
def test_a_module_for_a_checkpoint_is_that_of_a_fresh_start_but_for_its_values(name):
    before = torch.get_rng_state()
    empty, fresh = uninitialized(_BUILDS[name], _CPU), initialized(0, name, _BUILDS[name])
    assert torch.get_rng_state().equal(before)
    kinds = [[(name, t.shape, t.dtype, t.device) for name, t in each.state_dict().items()] for each in (empty, fresh)]
    assert kinds[0] == kinds[1]
    trained = [[p.requires_grad for p in each.parameters()] for each in (empty, fresh)]
    assert trained[0] == trained[1]
    assert {*dict(empty.named_buffers()), *dict(empty.named_parameters())} == empty.state_dict().keys()


def test_a_buffer_that_no_checkpoint_holds_is_refused():
    class WithTable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(3), persistent=False)

    with pytest.raises(AssertionError, match="table is in no state dict, so nothing would set it"):
        uninitialized(WithTable, _CPU)
