"""Positions and norms: properties and closed forms."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code

from vavae.models.dit.config import SIZES
from vavae.models.dit.layers import (
    RMSNorm,
    RotaryEmbedding,
    SwiGLU,
    attend,
    rotate,
    sincos_position_embedding,
    token_positions,
)

GRID = (5, 7)
HEAD_DIM = 16
tokens = st.tuples(st.integers(0, GRID[0] - 1), st.integers(0, GRID[1] - 1))


def rotated(vector):
    """One vector [head_dim] placed on every token: [h, w, head_dim]."""
    rotation = RotaryEmbedding(HEAD_DIM, GRID)()
    return rotate(vector.expand(1, GRID[0] * GRID[1], 1, -1), rotation).view(*GRID, -1)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), a=tokens, b=tokens, c=tokens)
def test_rotated_products_depend_on_the_relative_position_only(seed, a, b, c):
    q, k = torch.randn(2, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    d = (b[0] + c[0] - a[0], b[1] + c[1] - a[1])  # c is to d as a is to b
    assume(0 <= d[0] < GRID[0] and 0 <= d[1] < GRID[1])
    torch.testing.assert_close(rotated(q)[a] @ rotated(k)[b], rotated(q)[c] @ rotated(k)[d], atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31))
def test_rotation_preserves_norms_and_leaves_the_origin_alone(seed):
    x = torch.randn(HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    turned = rotated(x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm().expand(GRID))
    assert torch.equal(turned[0, 0], x)


def test_rows_turn_the_first_half_of_a_head_and_columns_the_second():
    turned = rotated(torch.ones(HEAD_DIM))
    first, second = turned.chunk(2, dim=-1)
    assert torch.equal(first, first[:, :1].expand_as(first))
    assert torch.equal(second, second[:1].expand_as(second))
    angle = torch.tensor(1.0)  # the highest frequency turns by one radian a step
    torch.testing.assert_close(first[1, 0, :2], torch.stack([angle.cos() - angle.sin(), angle.cos() + angle.sin()]))


def test_rotation_keeps_the_dtype():
    x = torch.ones(1, GRID[0] * GRID[1], 1, HEAD_DIM, dtype=torch.bfloat16)
    assert rotate(x, RotaryEmbedding(HEAD_DIM, GRID)()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_and_its_gradient_are_bitwise_those_of_stacked_pairs(dtype):
    rng = torch.Generator().manual_seed(0)
    shape, embedding = (2, GRID[0] * GRID[1], 3, HEAD_DIM), RotaryEmbedding(HEAD_DIM, GRID)
    values, weights = (torch.randn(shape, generator=rng).to(dtype) for _ in range(2))
    ours, theirs = (values.clone().requires_grad_() for _ in range(2))
    first, second = theirs.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)  # by a right angle
    cos, sin = embedding.freqs_cos[:, None], embedding.freqs_sin[:, None]
    expected, found = torch.addcmul(theirs * cos, turned, sin).type_as(theirs), rotate(ours, embedding())
    assert torch.equal(found, expected)
    for each in (expected, found):
        each.backward(weights)
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.skipif(" " in torch.__file__, reason="torch gives its compiler paths without quotes")
def test_a_compiled_rotation_writes_its_result_alone():
    x = torch.randn(1, GRID[0] * GRID[1], 2, HEAD_DIM, requires_grad=True)
    compiled, rotation = torch.compile(rotate, dynamic=False), RotaryEmbedding(HEAD_DIM, GRID)()
    with torch._inductor.config.patch(fx_graph_cache=False):
        _, codes = run_and_get_code(lambda: compiled(x, rotation).sum().backward())
    assert [code.count("= empty_strided_cpu(") for code in codes] == [1, 1], "forward and backward"


def test_sincos_embedding_swaps_its_halves_when_the_grid_is_transposed():
    width = 24
    embedding = sincos_position_embedding(width, GRID).view(*GRID, width)
    transposed = sincos_position_embedding(width, GRID[::-1]).view(*GRID[::-1], width)
    assert torch.equal(embedding.transpose(0, 1).roll(width // 2, dims=-1), transposed)


def test_sincos_embedding_puts_the_column_first_as_sine_then_cosine():
    _, column = token_positions(GRID)
    embedding = sincos_position_embedding(24, GRID)[0]
    torch.testing.assert_close(embedding[:, 0], column.sin().float())
    torch.testing.assert_close(embedding[:, 6], column.cos().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_computed_in_float32_and_keeps_the_dtype(dtype):
    norm = RMSNorm(64)
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    x = (100 * torch.randn(8, 64)).to(dtype)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight.to(dtype).double()
    out = norm(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_attention_among_few_tokens_in_bfloat16_on_a_cpu_is_that_of_float32_rounded():
    rng = torch.Generator().manual_seed(0)
    halves = [torch.randn(2, 3, 64, 32, generator=rng).bfloat16().requires_grad_() for _ in range(3)]
    singles = [half.detach().float().requires_grad_() for half in halves]
    with torch.autocast("cpu", torch.bfloat16):
        attended = attend(*halves)
    expected = attend(*singles)
    assert torch.equal(attended, expected.bfloat16())
    gradient = torch.randn(attended.shape, generator=rng).bfloat16()
    attended.backward(gradient)
    expected.backward(gradient.float())
    for half, single in zip(halves, singles, strict=True):
        assert half.grad is not None
        assert single.grad is not None
        assert torch.equal(half.grad, single.grad.bfloat16())


@pytest.mark.parametrize(("size", "hidden"), [("B", 2048), ("L", 2730), ("XL", 3072), ("1p0B", 4096), ("1p6B", 4778)])
def test_hidden_width_of_swiglu_is_the_published_one(size, hidden):
    with torch.device("meta"):
        assert SwiGLU(SIZES[size].width).w3.in_features == hidden
