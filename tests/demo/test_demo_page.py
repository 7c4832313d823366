"""The page itself: called as a program would, and clicked in a browser on a desk and on a phone."""

import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import psutil
import pytest
from PIL import Image
from support import image_shards
from support.browser import browser_page, on_desk_and_phone
from support.sockets import beyond_loopback
from support.trained_run import trained_run

from vavae.demo.playground import Playground

pytestmark = pytest.mark.integrations

SIZE = image_shards.SIZE
OVERRIDE = "guidance.scale=2"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    """The command as a process, until Ctrl-C; `url` is its page."""
    folder = tmp_path_factory.mktemp("server")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "vavae", "demo", run.storage.url(), OVERRIDE, "--port", "0", "--device", "cpu"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True
    ) as process:
        line = process.stdout.readline()
        assert line.endswith(f"serves {run.storage.url()}; Ctrl-C ends it\n"), line + process.stdout.read()
        process.url = line.split()[0]
        yield process
        assert [*folder.glob("vavae-demo-*")]
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert (process.wait(60), rest) == (0, "")
        assert not [*folder.glob("vavae-demo-*")], "pictures are kept"


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)).save(path)
    return path


def pixels_of(gallery):
    return np.stack([np.asarray(Image.open(each["image"])) for each in gallery])


def test_a_program_gets_the_pictures_of_the_library(server, run, photo):
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    client, playground = Client(server.url, verbose=False), Playground.at(run.storage.url(), [OVERRIDE], "cpu")
    settings = {"guidance_scale": 3, "solver_num_steps": 2, "solver_name": "heun", "more": "guidance.interval=[0.1, 1]"}
    overrides = ["guidance.scale=3", "solver.name=heun", "guidance.interval=[0.1, 1]"]
    gallery, command = client.predict(classes=["a", "b"], seed=3, images=2, **settings, api_name="/sample")
    expected = playground.sample(["a", "b"], 3, 2, overrides)
    np.testing.assert_array_equal(pixels_of(gallery), np.stack([np.asarray(each) for each, _ in expected]))
    assert [each["caption"] for each in gallery] == [caption for _, caption in expected]
    assert command == playground.command(["a", "b"], 3, 2, overrides)
    gallery = client.predict(first=3, last=4, images=3, label="a", **settings, api_name="/walk")
    assert [each["caption"] for each in gallery] == ["seed 3", "50%", "seed 4"]
    gallery, words = client.predict(picture=handle_file(photo), api_name="/reconstruct")
    expected, same = playground.reconstruct(photo.read_bytes())
    np.testing.assert_array_equal(pixels_of(gallery), np.stack([np.asarray(each) for each, _ in expected]))
    assert words == same
    with pytest.raises(AppError, match=r"classes: .* is none of the 3 classes"):
        client.predict(classes=["d"], seed=3, images=2, **settings, api_name="/sample")
    with pytest.raises(AppError, match=r"solver\.step .*no such key; did you mean solver\.num_steps"):
        client.predict(first=3, last=4, images=3, label="a", **settings | {"more": "solver.step=3"}, api_name="/walk")


def test_nobody_else_reaches_it(server):
    assert not beyond_loopback(psutil.Process(server.pid))
    request = urllib.request.Request(server.url, headers={"Host": "stranger.test"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)


@on_desk_and_phone
def test_a_click_shows_pictures(server, photo, width, scheme):
    strangers = []
    with browser_page(width, scheme) as page:
        page.on("request", lambda request: request.url.startswith(("http", "ws")) and strangers.append(request.url))
        page.goto(server.url)

        def click(role, name):
            page.get_by_role(role, name=name, exact=True).click()

        def sources(count):
            """Addresses of pictures, once as many are loaded as there should be."""
            code = """count => {
                const all = [...document.querySelectorAll(".pixels .thumbnail-item img")];
                const shown = all.filter((each) => each.offsetParent);
                const loaded = shown.every((each) => each.complete && each.naturalWidth > 0);
                return shown.length === count && loaded && shown.map((each) => `${each.src} ${each.naturalWidth}`);
            }"""
            return page.wait_for_function(code, arg=count).json_value()

        click("button", "Sample")
        before = sources(8)
        assert all(each.endswith(f" {SIZE}") for each in before)
        slider = page.locator("input[type=range][aria-label*=Guidance]:visible")
        slider.scroll_into_view_if_needed()
        area = slider.bounding_box()
        page.mouse.click(area["x"] + 0.9 * area["width"], area["y"] + area["height"] / 2)
        page.wait_for_function(
            "source => document.querySelector('.pixels img').src !== source", arg=before[0].split()[0]
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        click("tab", "Walk")
        click("button", "Walk")
        sources(8)
        click("tab", "Reconstruct")
        page.locator("input[type=file]").set_input_files(photo)
        sources(3)
        assert re.match(r"PSNR \d", page.get_by_label("Reconstruction").input_value())
        click("tab", "Run")
        page.frame_locator("iframe").get_by_role("heading", name="run", exact=True).wait_for()
    assert [each for each in strangers if not each.startswith((server.url, server.url.replace("http", "ws")))] == []
