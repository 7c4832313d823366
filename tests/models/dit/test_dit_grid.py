"""A trained model goes on at another resolution: the same weights, other tables of positions."""

import pytest
import torch

from vavae.errors import UserError
from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.layers import rotate
from vavae.models.dit.model import LightningDiT

DIM = 3


def model(grid, patch_size=1, seed=0, **switches):
    config = LightningDiTConfig(size=None, depth=1, width=32, heads=2, patch_size=patch_size, classes=5, **switches)
    generator = torch.Generator().manual_seed(seed)
    built = LightningDiT(config, DIM, grid, generator)
    for parameter in built.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return built


def tables(built):
    names = {name for name, _ in built.named_buffers()}
    assert names <= {"pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"}
    return dict(built.named_buffers())


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("grid", [32, 8, (16, 24)])
def test_weights_stay_and_tables_are_those_of_a_fresh_model(grid, patch, rope):
    trained = model(16, patch, rope=rope)
    carried, fresh = trained.at_grid(grid), model(grid, patch, seed=1, rope=rope)
    assert carried.grid == fresh.grid
    assert carried.tokens == fresh.tokens
    for (name, old), (_, new) in zip(trained.named_parameters(), carried.named_parameters(), strict=True):
        assert torch.equal(old, new), name
        assert old.data_ptr() != new.data_ptr(), f"{name} is shared: training one would change the other"
    assert tables(carried).keys() == tables(fresh).keys()
    for name, table in tables(fresh).items():
        assert torch.equal(tables(carried)[name], table), name
    fresh.load_state_dict(carried.state_dict())
    inputs = torch.ones(1, DIM, *carried.grid), torch.tensor([0.5]), torch.tensor([1])
    assert torch.equal(carried(*inputs), fresh(*inputs))


def test_the_model_it_comes_from_is_left_as_it_was():
    trained = model(16)
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    trained.at_grid(32, rescale=True)
    assert trained.grid == (16, 16)
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())


def test_there_and_back_is_the_same_model():
    trained = model(16)
    for rescale in (False, True):
        back = trained.at_grid(32, rescale=rescale).at_grid(16, rescale=rescale)
        assert all(torch.equal(a, b) for a, b in zip(trained.buffers(), back.buffers(), strict=True))


@pytest.mark.parametrize("grid", [32, (16, 32)])
def test_rescaled_positions_are_the_old_ones_with_others_between(grid):
    trained = model(16)
    carried = trained.at_grid(grid, rescale=True)
    rows, columns = (new // old for new, old in zip(carried.tokens, trained.tokens, strict=True))
    for name, table in tables(carried).items():
        table = table.view(*carried.tokens, -1)[::rows, ::columns]
        torch.testing.assert_close(table, tables(trained)[name].view(16, 16, -1), atol=1e-6, rtol=0)


def test_half_a_position_turns_by_half_the_angle():
    trained = model(16)
    q = torch.randn(16, generator=torch.Generator().manual_seed(0))

    def turned(by, vector):
        """A vector as the token in row 0, column 1 would have it."""
        return rotate(vector.expand(1, by.tokens[0] * by.tokens[1], 1, -1), by.feat_rope())[0, 1, 0]

    half = trained.at_grid(32, rescale=True)
    torch.testing.assert_close(turned(half, turned(half, q)), turned(trained, q))


def test_a_checkpoint_remembers_rescaled_positions():
    carried = model(16).at_grid(32, rescale=True)
    restored = model(32, seed=1)
    restored.load_state_dict(carried.state_dict())
    inputs = torch.ones(1, DIM, 32, 32), torch.tensor([0.5]), torch.tensor([1])
    assert torch.equal(restored(*inputs), carried(*inputs))
    assert not torch.equal(carried(*inputs), model(16).at_grid(32)(*inputs))


def test_tables_keep_the_dtype_of_the_weights():
    assert {buffer.dtype for buffer in model(16).bfloat16().at_grid(32).buffers()} == {torch.bfloat16}


def test_patches_must_tile_the_new_grid_too():
    with pytest.raises(UserError, match="patch_size=2 does not divide the 17 x 17 latent"):
        model(16, patch_size=2).at_grid(17)
