"""LightningDiT against an independent transformer, written from its description, in every combination of switches."""

import itertools
import math

import pytest
import torch

from vavae.models.dit.config import LightningDiTConfig
from vavae.models.dit.model import LightningDiT

DEPTH, WIDTH, HEADS, DIM, CLASSES = 2, 48, 3, 5, 4
GRID = (4, 8)
SWITCHES = [
    {"patch_size": patch, "qk_norm": qk_norm, "mlp": mlp, "norm": norm, "rope": rope, "shift": shift}
    for patch, qk_norm, mlp, norm, rope, shift in itertools.product(
        (1, 2), (True, False), ("swiglu", "gelu"), ("rmsnorm", "layernorm"), (True, False), (True, False)
    )
]


class Reference:
    """velocity(x, t, y) from a state dict in released names: loops and explicit sums, no layer of torch.nn."""

    def __init__(self, state, switches):
        self.state, self.switches = state, switches

    def linear(self, name, x):
        weight = self.state[f"{name}.weight"]
        return torch.einsum("...i,oi->...o", x, weight.flatten(1)) + self.state[f"{name}.bias"]

    def norm(self, name, x, eps):
        """Root mean square with a weight, or mean and variance with whatever the state dict has."""
        if self.switches["norm"] == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return x * self.state.get(f"{name}.weight", 1) + self.state.get(f"{name}.bias", 0)

    def head_norm(self, name, x):
        if not self.switches["qk_norm"]:
            return x
        return self.norm(name, x, 1e-6 if self.switches["norm"] == "rmsnorm" else 1e-5)

    def position(self, row, column):
        """sin and cos of the column, then of the row, each over the frequencies 10000^(-4k/D)."""
        angles = [[p / 10_000 ** (4 * k / WIDTH) for k in range(WIDTH // 4)] for p in (column, row)]
        return [f(angle) for axis in angles for f in (math.sin, math.cos) for angle in axis]

    def turned(self, x, row, column):
        """One head [..., head_dim] with its pairs as complex numbers: the first half by the row, then the column."""
        if not self.switches["rope"]:
            return x
        pairs = WIDTH // HEADS // 4
        angles = [p / 10_000 ** (k / pairs) for p in (row, column) for k in range(pairs)]
        turn = torch.polar(torch.ones(2 * pairs), torch.tensor(angles))
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    def modulation(self, name, c, parts):
        return self.linear(f"{name}.adaLN_modulation.1", c * torch.sigmoid(c))[:, None].chunk(parts, -1)

    def attention(self, name, x, places):
        q, k, v = self.linear(f"{name}.qkv", x).chunk(3, -1)
        outputs = []
        for head in range(HEADS):
            part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
            queries, keys = (
                torch.stack([self.turned(h[:, i], *place) for i, place in enumerate(places)], 1)
                for h in (
                    self.head_norm(f"{name}.q_norm", q[..., part]),
                    self.head_norm(f"{name}.k_norm", k[..., part]),
                )
            )
            scores = torch.einsum("bid,bjd->bij", queries, keys) / math.sqrt(WIDTH / HEADS)
            outputs.append(torch.einsum("bij,bjd->bid", scores.softmax(-1), v[..., part]))
        return self.linear(f"{name}.proj", torch.cat(outputs, -1))

    def feed_forward(self, name, x):
        if self.switches["mlp"] == "gelu":
            h = self.linear(f"{name}.fc1", x)
            h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
            return self.linear(f"{name}.fc2", h)
        a, b = self.linear(f"{name}.w12", x).chunk(2, -1)
        return self.linear(f"{name}.w3", a * torch.sigmoid(a) * b)

    def block(self, name, x, c, places):
        if self.switches["shift"]:
            shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(name, c, 6)
        else:
            scale1, gate1, scale2, gate2 = self.modulation(name, c, 4)
            shift1 = shift2 = 0
        x = x + gate1 * self.attention(
            f"{name}.attn", self.norm(f"{name}.norm1", x, 1e-6) * (1 + scale1) + shift1, places
        )
        return x + gate2 * self.feed_forward(f"{name}.mlp", self.norm(f"{name}.norm2", x, 1e-6) * (1 + scale2) + shift2)

    def __call__(self, x, t, y):
        patch = self.switches["patch_size"]
        places = [(row, column) for row in range(GRID[0] // patch) for column in range(GRID[1] // patch)]
        patches = [x[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].flatten(1) for r, c in places]
        tokens = self.linear("x_embedder.proj", torch.stack(patches, 1))
        tokens = tokens + torch.tensor([self.position(*place) for place in places])
        angles = t[:, None] * torch.tensor([10_000 ** (-k / 128) for k in range(128)])
        h = self.linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))
        c = self.linear("t_embedder.mlp.2", h * torch.sigmoid(h)) + self.state["y_embedder.embedding_table.weight"][y]
        for index in range(DEPTH):
            tokens = self.block(f"blocks.{index}", tokens, c, places)
        shift, scale = self.modulation("final_layer", c, 2)
        values = self.linear(
            "final_layer.linear", self.norm("final_layer.norm_final", tokens, 1e-6) * (1 + scale) + shift
        )
        out = torch.zeros_like(x)
        for index, (row, column) in enumerate(places):  # within a token the channel varies fastest
            square = values[:, index].view(-1, patch, patch, DIM).permute(0, 3, 1, 2)
            out[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = square
        return out


def differentiate(velocity, parameters, inputs, target):
    """The output, and the gradient norm of each parameter of its mean squared error."""
    out = velocity(*inputs)
    gradients = torch.autograd.grad((out - target).square().mean(), parameters)
    return out.detach(), gradients


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda switches: "-".join(map(str, switches.values())))
def test_outputs_and_gradients_equal_an_independent_transformer_and_survive_recomputation(switches):
    generator = torch.Generator().manual_seed(0)
    config = LightningDiTConfig(size=None, depth=DEPTH, width=WIDTH, heads=HEADS, classes=CLASSES, **switches)
    model = LightningDiT(config, DIM, GRID, generator)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    x, target = torch.randn(2, 3, DIM, *GRID, generator=generator)
    inputs = x, torch.rand(3, generator=generator), torch.tensor([0, 3, CLASSES])

    named = dict(model.named_parameters())
    out, gradients = differentiate(model, list(named.values()), inputs, target)
    expected, expected_gradients = differentiate(Reference(named, switches), list(named.values()), inputs, target)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    for name, gradient, other in zip(named, gradients, expected_gradients, strict=True):
        # Without RoPE a shift of all keys changes nothing, so the bias of their norm has no gradient but rounding.
        assert gradient.norm().item() == pytest.approx(other.norm().item(), rel=1e-4, abs=1e-8), name

    recomputing = LightningDiT(config.model_copy(update={"checkpoint_activations": True}), DIM, GRID)
    recomputing.load_state_dict(model.state_dict())
    again, gradients_again = differentiate(recomputing, list(recomputing.parameters()), inputs, target)
    assert torch.equal(again, out)
    assert all(torch.equal(a, b) for a, b in zip(gradients_again, gradients, strict=True))
