"""Files of weights: every way in which released ones are packed, and every way in which a file can be wrong."""

import argparse
import uuid
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vavae.errors import UserError
from vavae.interop.checkpoint_file import read_weights, write_weights

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.tensor([1, 2])}
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}


class Code:
    """Something that only a pickle that may run code can bring back."""


def wrapped(prefix):
    return {prefix + name: tensor for name, tensor in STATE.items()}


def is_state(weights):
    return weights.tensors.keys() == STATE.keys() and all(
        torch.equal(weights.tensors[name], tensor) and weights.tensors[name].dtype == tensor.dtype
        for name, tensor in STATE.items()
    )


@pytest.mark.parametrize(
    "stored",
    [
        STATE,
        {"ema": STATE, "model": OTHER, "state_dict": OTHER, "opt": {"state": [1]}},
        {"model": STATE, "ema": None, "config": {"ckpt": "x"}},
        {"state_dict": STATE, "epoch": 3, "hyper_parameters": {"lr": 1e-4}, "callbacks": {"best": torch.ones(())}},
        {"model": wrapped("module."), "ema": {}},
        {"model": wrapped("module.module.")},
        {"state_dict": wrapped("module._orig_mod.")},
        {"ema": STATE, "args": argparse.Namespace(lr=1e-4)},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_the_state_dict_is_found(tmp_path, stored, zipped):
    path = tmp_path / "model.pt"
    torch.save(stored, path, _use_new_zipfile_serialization=zipped)
    assert is_state(read_weights(path))


def test_a_prefix_that_only_some_names_have_belongs_to_them(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "model.pt")
    assert set(read_weights(tmp_path / "model.pt").tensors) == {"module.a", "b"}


def test_safetensors(tmp_path):
    save_file(wrapped("module."), tmp_path / "model.safetensors")
    assert is_state(read_weights(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.ckpt", "model.safetensors"])
@pytest.mark.parametrize("root", ["folder", "store"])
def test_what_is_written_is_read(tmp_path, name, root):
    path = f"memory://{uuid.uuid4()}/{name}" if root == "store" else str(tmp_path / "new" / name)
    write_weights(path, STATE, nest="ema")
    weights = read_weights(path)
    assert is_state(weights)
    assert weights.url.endswith(f"/{name}")


def test_a_view_is_written_without_what_it_is_a_view_of(tmp_path):
    whole = torch.ones(100_000)
    write_weights(tmp_path / "model.pt", {"part": whole[:10].requires_grad_()}, nest="ema")
    assert (tmp_path / "model.pt").stat().st_size < 10_000


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.pt", cut, "model.pt: cut off, or no PyTorch checkpoint; fetch it again$"),
        ("old.pt", cut, "old.pt: cut off, or no PyTorch checkpoint"),
        ("model.pt", lambda path: path.write_bytes(b""), "cut off, or no PyTorch checkpoint"),
        ("model.pt", lambda path: path.write_text("<html>not found</html>"), "cut off, or no PyTorch checkpoint"),
        ("model.pt", Path.unlink, "model.pt: no such file$"),
        ("model.safetensors", cut, "model.safetensors: cut off, or no safetensors file"),
        ("model.safetensors", lambda path: path.write_bytes(b""), "cut off, or no safetensors file"),
        ("model.safetensors", Path.unlink, "no such file$"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, name, damage, message):
    path = tmp_path / name
    if name == "old.pt":
        torch.save(STATE, path, _use_new_zipfile_serialization=False)
    else:
        write_weights(path, STATE, nest="ema")
    damage(path)
    with pytest.raises(UserError, match=message) as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"epoch": 1, "weights": STATE}, r"holds a mapping of epoch, weights, expected tensors by name, or such a"),
        ({"model": {"a": 1}}, "holds a mapping of a, expected"),
        ({}, "holds nothing, expected"),
        ([torch.ones(1)], "holds a list, expected"),
        (
            {"state_dict": STATE, "hyper_parameters": Code()},
            r"holds a [\w.]*test_checkpoint_file.Code, and reading that can run code; where you trust the file",
        ),
    ],
)  # fmt: skip
def test_a_file_without_a_state_dict_is_refused_in_one_line(tmp_path, stored, message):
    torch.save(stored, tmp_path / "model.pt")
    with pytest.raises(UserError, match=message) as caught:
        read_weights(tmp_path / "model.pt")
    assert "\n" not in str(caught.value)


def test_other_suffixes_are_refused_before_anything_is_done(tmp_path):
    for act in (read_weights, lambda path: write_weights(path, STATE, nest="ema")):
        with pytest.raises(
            UserError, match=r"model.zip: a file of weights ends in .pt, .pth, .ckpt, .bin, .safetensors"
        ):
            act(tmp_path / "model.zip")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"model.pt: cannot write there"):
        write_weights(tmp_path / "file" / "model.pt", STATE, nest="ema")
