"""The page of a run in gradio: its controls, and which picture each of them changes."""

from collections.abc import Callable, Sequence
from functools import wraps
from html import escape
from typing import Any

import gradio as gr

from vavae.demo.playground import Captioned, Playground
from vavae.errors import UserError
from vavae.report.run_facts import run_summary

_IMAGES = 8
"""Images of a class at first."""
_MOST_IMAGES = 32
_CLASSES: dict[str, Any] = {"allow_custom_value": True, "info": "A number may be typed, too."}
"""Settings of the fields that take names of classes."""
_SYSTEM_FONTS = {
    "font": [gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")],
    "font_mono": [gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")],
}
THEME = gr.themes.Default(primary_hue="blue", neutral_hue="slate", **_SYSTEM_FONTS)
CSS = """
.title h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
.title p { margin: .2rem 0 0; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.pixels img { image-rendering: pixelated; width: 100%; }
.pixels .grid-wrap { min-height: 10rem; max-height: none; }
.pixels:has(.preview) .grid-wrap { min-height: 28rem; }
.pixels .grid-container { grid-template-columns: repeat(auto-fill, minmax(min(6rem, 22%), 1fr)); }
.pixels.large .grid-container { grid-template-columns: repeat(auto-fill, minmax(min(14rem, 100%), 1fr)); }
.pixels .thumbnail-item { height: auto; aspect-ratio: auto; background: none; border-radius: 0; box-shadow: none; }
.pixels .thumbnail-item img { height: auto; border-radius: 0; }
.pixels .caption-label { position: static; max-width: none; padding: 0; border: 0; box-shadow: none; background: none; }
.report iframe { display: block; width: 100%; height: 85vh; border: 0; }
@media (max-width: 40rem) { .pictures { order: -1; } }
"""


def build_page(playground: Playground) -> gr.Blocks:
    """Build the page of a run: samples and walks where there is a LightningDiT, reconstructions, and the report."""
    config = playground.run.config
    with gr.Blocks(title=config.name, analytics_enabled=False) as page:
        title = f"<h1>{escape(config.name)}</h1><p>{escape(run_summary(config))}</p>"
        gr.HTML(title, elem_classes="title")
        if playground.sampler is not None:
            with gr.Tab("Sample"):
                _build_samples(playground)
            with gr.Tab("Walk"):
                _build_walk(playground)
        with gr.Tab("Reconstruct"):
            _build_reconstruction(playground)
        with gr.Tab("Run"):
            link = '<p><a href="report" target="_blank">The report by itself</a></p>'
            frame = f'<iframe src="report" title="Report of {escape(config.name)}" loading="lazy"></iframe>'
            gr.HTML(link + frame, elem_classes="report")
    return page


def _build_samples(playground: Playground) -> None:
    assert playground.sampler is not None, "there is a LightningDiT"
    classes = playground.sampler.classes
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            fields: dict[str, gr.components.Component] = {}
            if classes:
                first = [classes[0]]
                fields["classes"] = gr.Dropdown([*classes], value=first, multiselect=True, **_CLASSES, label="Classes")
            fields["seed"] = gr.Number(0, precision=0, minimum=0, label="First seed")
            fields["images"] = gr.Slider(1, _MOST_IMAGES, _IMAGES, step=1, label="Images of a class")
            with gr.Row():
                go = gr.Button("Sample", variant="primary", min_width=100)
                other = gr.Button("Other seeds", min_width=100)
            fields |= (how := _controls(playground))
        with gr.Column(scale=3, min_width=320, elem_classes="pictures"):
            pictures = _gallery("Samples")
            command = gr.Textbox(label="The same from the shell", interactive=False, buttons=["copy"])

    def sample(seed: int, images: int, classes: Sequence[str] | None = None, **values: Any) -> tuple[Any, str]:
        """Generate images of every class with consecutive seeds, class after class."""
        wanted = classes, int(seed or 0), int(images), _overrides(values)
        return playground.sample(*wanted), playground.command(*wanted)

    places = [fields["seed"], fields["images"]]
    other.click(lambda seed, images: int(seed or 0) + images, places, places[0], api_visibility="private")
    changed = [fields[name].change for name in ("classes", "seed") if name in fields]
    released = [fields["images"].release]
    _on([go.click, *changed, *released, *_changes(how)], sample, fields, [pictures, command], "sample")


def _build_walk(playground: Playground) -> None:
    assert playground.sampler is not None, "there is a LightningDiT"
    classes = playground.sampler.classes
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            fields: dict[str, gr.components.Component] = {}
            if classes:
                fields["label"] = gr.Dropdown([*classes], value=classes[0], **_CLASSES, label="Class")
            with gr.Row():
                fields["first"] = gr.Number(0, precision=0, minimum=0, label="From seed", min_width=100)
                fields["last"] = gr.Number(1, precision=0, minimum=0, label="To seed", min_width=100)
            fields["images"] = gr.Slider(2, _MOST_IMAGES, _IMAGES, step=1, label="Images")
            go = gr.Button("Walk", variant="primary")
            fields |= (how := _controls(playground))
        with gr.Column(scale=3, min_width=320, elem_classes="pictures"):
            pictures = _gallery("From seed to seed")

    def walk(first: int, last: int, images: int, label: str | None = None, **values: Any) -> list[Captioned]:
        """Generate the images of two seeds and some between them, whose noise is interpolated."""
        return playground.walk(label, int(first or 0), int(last or 0), int(images), _overrides(values))

    changed = [fields[name].change for name in ("label", "first", "last") if name in fields]
    _on([go.click, *changed, fields["images"].release, *_changes(how)], walk, fields, [pictures], "walk")


def _build_reconstruction(playground: Playground) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            picture = gr.File(type="binary", file_types=["image"], label="Picture of any size", height=140)
            words = gr.Textbox(label="Reconstruction", interactive=False)
        with gr.Column(scale=3, min_width=320):
            pictures = _gallery("Picture, reconstruction and difference", "large")

    def reconstruct(picture: bytes | None) -> tuple[list[Captioned], str]:
        """Encode and decode a picture; its difference from what comes back, and the PSNR."""
        return ([], "") if picture is None else playground.reconstruct(picture)

    _on([picture.change], reconstruct, {"picture": picture}, [pictures, words], "reconstruct")


def _controls(playground: Playground) -> dict[str, gr.components.Component]:
    """Sliders of guidance and steps, the solver, and any other key, by the names that `_overrides` takes."""
    controls: dict[str, gr.components.Component] = {
        each.key.replace(".", "_"): gr.Slider(each.low, each.high, each.value, step=each.step, label=each.label)
        for each in playground.sliders
    }
    solvers = playground.solvers
    controls["solver_name"] = gr.Radio(solvers, value=solvers[0], label="Solver")
    more = "guidance.interval=[0.1, 1] solver.shift=0.5"
    controls["more"] = gr.Textbox("", label="Other keys of guidance and solver", placeholder=more)
    return controls


def _overrides(values: dict[str, Any]) -> list[str]:
    """Overrides of the configuration from the values of `_controls`."""
    further = values.pop("more", "")
    return [*(f"{name.replace('_', '.', 1)}={value}" for name, value in values.items()), further]


def _changes(controls: dict[str, gr.components.Component]) -> list[Any]:
    """Events of `_controls` that call for other pictures: a slider that is released, a choice, a line of keys."""
    return [
        control.release if isinstance(control, gr.Slider) else control.submit if name == "more" else control.change
        for name, control in controls.items()
    ]


def _gallery(label: str, *classes: str) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        show_label=False,
        format="png",
        height="auto",
        buttons=["download", "fullscreen"],
        interactive=False,
        elem_classes=["pixels", *classes],
    )


def _on(
    events: Sequence[Any],
    function: Callable[..., Any],
    fields: dict[str, gr.components.Component],
    outputs: Sequence[gr.components.Component],
    name: str,
) -> None:
    """Let events call a function, one call of the whole page at a time, and show a user's error as a message.

    Args:
        events: of components.
        function: takes the values of the fields by name.
        fields: components by the name of the argument.
        outputs: components that show what it returns.
        name: of the endpoint, for gradio_client.
    """

    @wraps(function)
    def shown(*values: Any, **controls: Any) -> Any:
        try:
            return function(*values, **controls)
        except UserError as error:
            raise gr.Error(escape(str(error)), duration=None, print_exception=False) from error

    gr.on(
        events,
        shown,
        inputs_kwargs=fields,
        outputs=[*outputs],
        api_name=name,
        concurrency_id="models",
        concurrency_limit=1,
        trigger_mode="always_last",
    )
