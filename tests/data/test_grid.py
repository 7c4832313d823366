import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vavae.data.image import png_bytes
from vavae.data.pixels import image_grid, pair_grid


def images(count: int, height: int = 3, width: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("scale", [1, 4])
def test_every_pixel_is_where_it_belongs(scale: int):
    drawn, columns, padding = images(5), 3, 2
    grid = np.asarray(image_grid(drawn, columns, scale=scale, padding=padding))
    assert grid.shape == (2 * 3 * scale + padding, 3 * 2 * scale + 2 * padding, 4)
    for index, image in enumerate(drawn):
        top, left = index // columns * (3 * scale + padding), index % columns * (2 * scale + padding)
        for dy in range(3 * scale):
            for dx in range(2 * scale):
                expected = [*image[:, dy // scale, dx // scale].tolist(), 255]
                assert grid[top + dy, left + dx].tolist() == expected
    assert (grid[..., 3] == 0).sum() == grid[..., 3].size - 5 * 6 * scale**2


def test_few_images_make_no_empty_columns():
    assert image_grid(images(2), 10, padding=1).size == (2 * 2 + 1, 3)


def test_originals_stand_above_their_reconstructions():
    originals = images(3)
    grid = np.asarray(pair_grid(originals, 255 - originals, 2, padding=2))
    assert grid.shape == (2 * (3 + 2 + 3) + 8, 2 * 2 + 2, 4)
    for index, (top, left) in enumerate([(0, 0), (0, 4), (16, 0)]):
        above, below = grid[top : top + 3, left : left + 2, :3], grid[top + 5 : top + 8, left : left + 2, :3]
        assert np.array_equal(above, originals[index].permute(1, 2, 0).numpy())
        assert np.array_equal(below, 255 - above)


def test_png_keeps_every_value():
    grid = image_grid(images(4), 2)
    restored = Image.open(io.BytesIO(png_bytes(grid)))
    assert restored.format == "PNG"
    assert np.array_equal(np.asarray(restored), np.asarray(grid))


def test_other_images_are_refused():
    with pytest.raises(AssertionError, match="pixels of 8 or 16 bits"):
        image_grid(images(2).float(), 2)
    with pytest.raises(AssertionError, match="at least one"):
        image_grid(images(0), 2)
    with pytest.raises(AssertionError, match="do not pair"):
        pair_grid(images(2), images(3), 2)
