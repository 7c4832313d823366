"""Samples pipeline folders with diffusers in a process that has no vavae: ``python -I pipeline_process.py FOLDER``.

The folder holds `requests.json`, a list of dictionaries: `pipeline`, the folder of a pipeline; `save`, if it is to be
saved into that folder and loaded again first; `dtype`, if it is to be moved to it; and `arguments` of its call, with
`noise` of the file `noise.safetensors` as latents unless a `seed` is among them. Images `pt` go to `images.safetensors`
by number.
"""

import importlib.abc
import json
import sys
from pathlib import Path

HERE, FOLDER = Path(__file__).parents[2], Path(sys.argv[1])
sys.path.insert(0, str(HERE))
import vavae.torchvision_compat  # noqa: E402, F401  (of this environment, not of the pipeline)

sys.path.remove(str(HERE))
for name in [name for name in sys.modules if name.partition(".")[0] == "vavae"]:
    del sys.modules[name]


class NoVavae(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "vavae":
            raise ImportError(f"{name} is not installed")


sys.meta_path.insert(0, NoVavae())

import torch  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_num_threads(1)
images, noise = {}, load_file(FOLDER / "noise.safetensors")["noise"]
for number, request in enumerate(json.loads((FOLDER / "requests.json").read_text())):
    pipeline = DiffusionPipeline.from_pretrained(request["pipeline"], trust_remote_code=True)
    if "save" in request:
        pipeline.save_pretrained(request["save"])
        pipeline = DiffusionPipeline.from_pretrained(request["save"], trust_remote_code=True)
    if "dtype" in request:
        pipeline = pipeline.to(getattr(torch, request["dtype"]))
    pipeline.set_progress_bar_config(disable=True)
    arguments = request["arguments"]
    if "seed" in arguments:
        arguments["generator"] = torch.Generator().manual_seed(arguments.pop("seed"))
    else:
        arguments["latents"] = noise
    found = pipeline(**arguments, output_type="pt").images
    if request.get("compare"):
        again = {kind: pipeline(**arguments, output_type=kind).images for kind in ("np", "pil")}
        assert (again["np"] == found.permute(0, 2, 3, 1).numpy()).all()
        assert [image.size for image in again["pil"]] == [(found.shape[3], found.shape[2])] * len(found)
        (pixel,) = again["pil"][0].crop((1, 2, 2, 3)).getdata()
        assert pixel == tuple((found[0, :, 2, 1] * 255).round().int().tolist())
    images[str(number)] = found.float().contiguous()
save_file(images, FOLDER / "images.safetensors")
