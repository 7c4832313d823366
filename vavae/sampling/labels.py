"""The classes of generated images; the one label of a model without classes is 0, its null label."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches

from vavae.errors import UserError
from vavae.randomness import numpy_generator
from vavae.runs.config import RunConfig
from vavae.sampling.config import SampleConfig


def label_law(config: SampleConfig, classes: Sequence[str], seed: int) -> Callable[[int], int]:
    """Make the function from the index of a sample to its label; a random one depends on seed and index alone.

    Args:
        config: how labels are chosen.
        classes: names of the classes, in the order of their labels.
        seed: seed of the run.

    Raises:
        UserError: a given label names no class.
    """
    if not classes and isinstance(config.labels, str):
        return lambda index: 0
    if config.labels == "random":
        return lambda index: int(numpy_generator(seed, "sample label", index).integers(len(classes)))
    given = (
        range(len(classes))
        if config.labels == "class_balanced"
        else find_classes(config.labels, classes, "sample.labels")
    )
    return lambda index: given[index % len(given)]


def check_classes(config: RunConfig, classes: Sequence[str]) -> None:
    """Check that what samples are asked to show is there.

    Args:
        config: of a run, with its samples and their guidance.
        classes: names of the classes of its images.

    Raises:
        UserError: a given label names no class, or there is guidance and no class to guide to.
    """
    label_law(config.sample, classes, config.seed)
    mean_flow = config.objective.mean_flow
    if not classes and mean_flow is not None and mean_flow.guides:
        raise UserError(
            "objective.mean_flow trains guided velocities, but the images have no classes to guide to: leave out its "
            "scale and mix, or max_scale"
        )
    if not classes and config.guidance.scale != 1:
        raise UserError(
            f"guidance.scale={config.guidance.scale:g}, but the images have no classes to guide to: "
            "set guidance.scale=1"
        )


def wanted_labels(wanted: Sequence[int | str] | None, classes: Sequence[str], place: str) -> list[int]:
    """Labels of the classes that are asked for; the null label alone where there are none to ask for.

    Args:
        wanted: names or numbers; None where none were given.
        classes: names of all classes, in the order of their labels.
        place: as for :func:`find_classes`.

    Raises:
        UserError: no such class exists, or none was given and there are some.
    """
    if wanted is None and classes:
        raise UserError(f"{place} is missing: name some of the {len(classes)}, such as {classes[0]}")
    return [0] if wanted is None else find_classes(wanted, classes, place)


def find_classes(wanted: Sequence[int | str], classes: Sequence[str], place: str) -> list[int]:
    """Find labels of classes by name or number; a number that is also the name of a class is taken for the name.

    Args:
        wanted: names or numbers.
        classes: names of all classes, in the order of their labels.
        place: option or key that asks for them, for the error.

    Raises:
        UserError: no such class exists.
    """
    if not classes:
        raise UserError(f"{place}: the images have no classes: leave it out")
    labels = {name: label for label, name in enumerate(classes)}
    return [_find(str(name), labels, place) for name in wanted]


def _find(name: str, labels: dict[str, int], place: str) -> int:
    if name in labels:
        return labels[name]
    if name.isdecimal() and int(name) < len(labels):
        return int(name)
    near = get_close_matches(name, labels, n=1)
    hint = f"; did you mean {near[0]}?" if near else f", such as {next(iter(labels))}"
    raise UserError(
        f"{place}: {name!r} is none of the {len(labels)} classes: give a number from 0 to {len(labels) - 1} or a "
        f"name{hint}"
    )
