"""Configuration of sampling: number, classes and files of the generated images."""

from typing import Annotated, Literal

from pydantic import Field

from vavae.config import Config, added, runtime
from vavae.distributed.config import Precision

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""Names of folders: of a run, and of an average of weights in it."""


class SampleConfig(Config):
    """A set of generated images."""

    images: int = Field(1000, ge=1)
    """Number of images; when it is raised, those that are there stay."""
    labels: Literal["class_balanced", "random"] | Annotated[tuple[int | str, ...], Field(min_length=1)] = (
        "class_balanced"
    )
    """Image i shows class i mod (number of classes), or a random class, or class i mod (length) of a list of names
    or numbers."""
    weights: str | None = added(None, pattern=NAME_PATTERN)
    """Name of the average of the LightningDiT's weights that generates them: one of `train_lightningdit.averages`, or
    one that `vavae average` has reconstructed. Null takes the LightningDiT's export."""
    shard_images: int = Field(500, ge=1)
    """Images of one output shard, the unit that is made at once and resumed."""
    precision: Precision = added("fp32")
    """Precision of the layers of LightningDiT and decoder; the solver's state is always fp32. Published figures are
    those of `fp32`. `bf16`, made for GPUs, moves pixels by 1 to 4 % of their spread (root mean square, random
    weights)."""
    compile_blocks: bool | None = runtime(None)
    """Compile the blocks of the LightningDiT and the tokenizer's residual blocks with `torch.compile`: images differ by
    rounding alone, and the first batch of each size takes a minute or more. Null does on GPUs that promise no bits,
    where there is a compiler."""
    npz: bool = runtime(False)
    """Write all images into `samples.npz` as well, as the evaluator of ADM reads them."""
    batch_size: int = runtime(100, ge=1)
    """Images integrated at a time."""
    actors: int = runtime(1, ge=1)
    """Shards generated at the same time, each by `workers.cpus` cores or one GPU."""
    picture_columns: int = runtime(10, ge=1)
    """Images per class in the picture `samples.png`, a class a row; or in each of as many rows where there is one class
    or none, or more than 20, of each of the first of which it shows one image."""

    @property
    def weights_in_words(self) -> str:
        """The average that generates them, to follow other words; empty where it is the export."""
        return "" if self.weights is None else f", average {self.weights}"

    def in_words(self, count: int, classes: int | None) -> str:
        """Describe so many of these images, for the protocol of a metric.

        Args:
            count: number of images.
            classes: number of classes of the run's images; None where it is not known.
        """
        if classes == 0:
            return f"{count:,} samples"
        if self.labels == "class_balanced" and classes is not None and count < classes:
            return f"{count:,} samples, one of each of the first {count:,} of {classes:,} classes"
        if self.labels == "class_balanced":
            each, more = divmod(count, classes or 1)
            return f"{count:,} class-balanced samples" + (f" ({each:,} or {each + 1:,} of a class)" if more else "")
        if self.labels == "random":
            return f"{count:,} randomly labelled samples"
        return f"{count:,} samples of {len(self.labels)} given labels"
