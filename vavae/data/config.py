"""Configuration of image shards and of the stream of training images."""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator
from typing_extensions import Self

from vavae.config import Config, LocalPath, added, as_one_number, height_and_width, runtime

Crop = Literal["center", "random", "random_resized"]
_LEAST_SIDE = 8
SourceName = Annotated[
    str, Field(min_length=1), LocalPath(words=("digits",), names=("huggingface:", "torchvision:"), before=("indexed:",))
]


def _check_size(value: Any, check: ValidatorFunctionWrapHandler) -> int | tuple[int, int]:
    try:
        size: int | tuple[int, int] = check(as_one_number(value))
    except ValidationError:
        size = 0
    if min(height_and_width(size)) < _LEAST_SIDE:
        raise ValueError(f"{value} is no side in pixels from {_LEAST_SIDE} on, and no [height, width] of such")
    return size


NO_LABELS = "none"
"""`shards.label_key` of images that are taken without labels."""


class PixelFormat(NamedTuple):
    """Channels of images, and bits of each."""

    channels: int = 3
    """1: gray, 3: red, green and blue, 4: with opacity."""
    depth: int = 8

    @property
    def largest(self) -> int:
        """Largest value of a channel; the least is 0."""
        return 2**self.depth - 1

    @property
    def in_words(self) -> str:
        """Channels and depth, for the protocol of a metric."""
        return f"{ ({1: 'gray', 3: 'color', 4: 'color and opacity'}[self.channels]) } of {self.depth} bits"

    def as_color(self, depth: int = 8) -> str:
        """Say how networks that take color see such images, for the protocol of a metric; empty where they are color.

        Args:
            depth: bits to which a channel is rounded.
        """
        seen = {1: "gray seen three times", 3: "", 4: "color seen over mid-gray where it is not opaque"}[self.channels]
        return f"{seen}, {self.depth} bits rounded to {depth}" if self.depth > depth else seen

    @property
    def fields(self) -> dict[str, int | None]:
        """Channels and depth as fields of a manifest, None where they are those of `RGB`."""
        return {name: None if value == getattr(RGB, name) else value for name, value in self._asdict().items()}


RGB = PixelFormat()


class RecordKeys(NamedTuple):
    """Names of the image and the class of a record, or of the columns of a set; None where only one can be meant."""

    image: str | None = None
    label: str | None = None


class ShardsConfig(Config):
    """Conversion of a set of images to shards.

    The sources are `runtime`: what is in them enters the records of the shards by content, wherever they lie.
    """

    source: SourceName = runtime()
    """Images, with a class each or with none: a folder of class folders or of images alone, a .zip or .tar(.gz) of such
    a folder (path or URL; `#train` after an archive means its folder `train`), a .tar of one .tar per class such as
    ILSVRC2012_img_train.tar,
    `digits`, `huggingface:<name>[#split]` or `torchvision:<Class>[#split]`. Or `indexed:<folder>`: the shards of a
    manifest that `vavae data index` wrote, with both splits, used where they lie."""

    labels: Annotated[str, Field(min_length=1), LocalPath()] | None = runtime(None)
    """Classes of images that lie in no class folders: a CSV with a header, or a text as `validation_labels`."""

    image_key: str | None = added(None, min_length=1)
    """Column of a data set that holds the images; null takes the only one. (`vavae data index --image-key` says it of
    shards that others made: the member of a record, such as `jpg`.)"""

    label_key: str | None = added(None, min_length=1)
    """Place of the class of an image: a column of a data set, of a `metadata.jsonl`, a `metadata.csv` or `labels`.
    Null takes the column `label` or the only one that can be meant; `none` takes the images without labels. (`vavae
    data index --label-key` says it of shards that others made: a member such as `cls`, or `json.label`.)"""

    validation_source: SourceName | None = runtime(None)
    """Held-out images with the same classes, named likewise."""

    validation_labels: Annotated[str, Field(min_length=1), LocalPath()] | None = runtime(None)
    """Classes of held-out images that lie in no class folders, such as ILSVRC2012_img_val.tar: ImageNet's development
    kit (ILSVRC2012_devkit_t12.tar.gz), Kaggle's LOC_val_solution.csv, or a text with the class of one image on each
    line, in the order of their names or after its name."""

    validation_fraction: float = Field(0.05, ge=0, lt=1)
    """Expected share of images held out where there is no validation source, chosen by a hash of their names."""

    image_size: Annotated[int | tuple[int, int], WrapValidator(_check_size)] = 256
    """Side in pixels of the stored images, or `[height, width]`, after ADM's center crop and resize: images are scaled
    to cover it, and cut."""

    channels: Literal[1, 3, 4] = added(3)
    """Channels of the stored images: 1 is gray, 3 color, 4 color with opacity. Networks that take color see gray three
    times, and color over mid-gray where it is not opaque."""

    depth: Literal[8, 16] = added(8)
    """Bits of a channel; 16 is for gray, as of medical images. Networks that take 8 bits see it divided by 257."""

    keep_original: bool = False
    """Store JPEG, PNG and WebP files as they are wherever both sides reach those of `image_size`."""

    format: Literal["png", "jpeg"] = "png"
    """File format of images that are not kept as they are."""

    jpeg_quality: int = Field(95, ge=1, le=100)
    """Quality of `format: jpeg`; colors are not subsampled."""

    shard_images: int = Field(2000, ge=1)
    """Most images in a shard; keep a shard below 256 MB."""

    seed: int = Field(0, ge=0)
    """Seed that keys the order of the images and the choice of the held-out ones."""

    @property
    def height_and_width(self) -> tuple[int, int]:
        """Height and width of the stored images, pixels."""
        return height_and_width(self.image_size)

    @property
    def pixel_format(self) -> PixelFormat:
        """Channels and depth of the stored images."""
        return PixelFormat(self.channels, self.depth)

    @property
    def keys(self) -> RecordKeys:
        """Columns of the images and of their classes."""
        return RecordKeys(self.image_key, self.label_key)

    @model_validator(mode="after")
    def _format_holds_them(self) -> Self:
        if self.depth == 16 and self.channels != 1:
            raise ValueError(f"depth=16 with channels={self.channels}: 16 bits are for gray images; set channels=1")
        if self.format == "jpeg" and (self.channels == 4 or self.depth == 16):
            raise ValueError(f"format=jpeg with channels={self.channels} and depth={self.depth}: set format=png")
        return self

    @model_validator(mode="after")
    def _labels_need_images(self) -> Self:
        if self.validation_labels and not self.validation_source:
            raise ValueError(f"validation_labels={self.validation_labels} without a validation_source: name its images")
        return self


class StreamConfig(Config):
    """The order in which training sees the records of shards, and how images are cut."""

    lanes: int = Field(32, ge=1)
    """Virtual ranks that the order is cut into; fixed for the life of a run, divides every global batch."""

    block: int | None = Field(None, ge=1)
    """Consecutive records of a lane that are shuffled together; null makes all lanes together shuffle 65,536."""

    crop: Crop = "random"
    """Cut of `shards.image_size` from an image of another size: `center` as ADM does; `random` scales the image to
    cover it and cuts anywhere; `random_resized` cuts a random part and scales it."""

    flip: bool = False
    """Mirror half of the images that train the tokenizer."""

    workers: int = runtime(0, ge=0)
    """Loader processes per training worker; 0 reads in the training process. Their number changes no sample."""

    open_shards: int = runtime(256, ge=1)
    """Shards that a process keeps mapped. A lane draws from up to three at a time where shards are as long as blocks;
    with fewer than all lanes of a process draw from, it maps them again and again."""

    prefetch_bytes: int = runtime(1 << 30, ge=0)
    """Most bytes that a training worker fetches from a store before the stream needs them, but always the next shard;
    and most that its loader processes hold ready in shared memory, but always a micro-batch each. Less where the cache
    of `storage` has no room for it. 0 fetches a shard when it is needed."""

    unreadable_limit: int = runtime(100, ge=0)
    """Images that may turn out unreadable, each replaced by the next of its shard, before the training stops."""
