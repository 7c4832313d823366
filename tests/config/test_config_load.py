"""Loading: inheritance, overrides, and the one line that every mistake gets."""

import os
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import Field, field_validator, model_validator

from vavae.config import Config, digest, dump, load
from vavae.config.presets import PRESETS, find_config, preset_names
from vavae.config.yaml_source import parse
from vavae.errors import UserError


class Timm(Config):
    kind: Literal["timm"] = "timm"
    name: str = "efficientnet"
    timm: int = 1


class Random(Config):
    kind: Literal["random"] = "random"
    width: int = Field(8, gt=0)


class Tokenizer(Config):
    latent_dim: int = 32
    size: tuple[int, int] = (16, 16)
    teacher: Annotated[Timm | Random, Field(discriminator="kind")] = Timm()
    head: Random | None = None

    @field_validator("latent_dim")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("should be even")
        return value

    @model_validator(mode="after")
    def _small(self) -> "Tokenizer":
        if self.latent_dim > self.size[0] * self.size[1]:
            raise ValueError(f"latent_dim {self.latent_dim} exceeds size {self.size}")
        return self


class Stage(Config):
    images: int
    rate: float = 1e-4


class Job(Config):
    name: str
    tokenizer: Tokenizer = Tokenizer()
    stages: tuple[Stage, ...] = ()
    weights: dict[str, float] = Field(default_factory=dict)
    steps: int | Literal["auto"] = "auto"
    flip: bool = False


class Free(Config):
    """Every kind of value that a configuration may hold."""

    text: str
    number: float
    count: int
    maybe: str | None
    texts: tuple[str, ...]
    mapping: dict[str, float]


FULL = """\
name: full
tokenizer:
  latent_dim: 8
  size: [4, 4]
stages:
- images: 3
- {images: 4, rate: 5e-4}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("full.yaml", FULL)


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def complaint(path: str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(Job, path, overrides)
    assert "\n" not in str(error.value)
    assert "pydantic" not in str(error.value)
    return str(error.value)


def test_file_and_overrides_make_one_configuration():
    job = load(Job, "full.yaml", ["tokenizer.latent_dim=4", "tokenizer.latent_dim=6", "stages.1.images=7", "flip=yes"])
    assert job == Job(
        name="full",
        tokenizer=Tokenizer(latent_dim=6, size=(4, 4)),
        stages=(Stage(images=3), Stage(images=7, rate=5e-4)),
        flip=True,
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("-2E+3", -2000.0), ("1_000.5", 1000.5), (".5", 0.5), ("3", 3), ("-1_000", -1000)],
)
def test_numbers_are_read_as_people_write_them(text: str, value: float):
    read = parse(text, str).value
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize("text", ["no", "on", "2024-01-01", "010", "12:30", "1e", "nan", "a#b", "s3://bucket/key"])
def test_words_stay_words(text: str):
    assert load(Job, "full.yaml", [f"name={text}"]).name == text


def test_a_whole_section_merges_and_null_clears_it_first():
    assert load(Job, "full.yaml", ["tokenizer={latent_dim: 2}"]).tokenizer == Tokenizer(latent_dim=2, size=(4, 4))
    assert load(Job, "full.yaml", ["tokenizer=null", "tokenizer={latent_dim: 2}"]).tokenizer == Tokenizer(latent_dim=2)
    assert load(Job, "full.yaml", ["tokenizer.head=", "tokenizer.head.width=3"]).tokenizer.head == Random(width=3)


def test_inherited_files_are_merged_first_in_their_order():
    write(
        "base/a.yaml", "name: a\ntokenizer: {latent_dim: 2, size: [8, 8]}\nweights: {x: 1, y: 1}\nstages: [{images: 1}]"
    )
    write("base/b.yaml", "defaults: a.yaml\nname: b\nweights: {y: 2}")
    write("other.yaml", "weights: {z: 3}")
    write("run.yaml", "defaults: [base/b.yaml, other.yaml]\ntokenizer: {latent_dim: 4}\nstages: []")
    job = load(Job, "run.yaml")
    assert (job.name, job.weights, job.stages) == ("b", {"x": 1, "y": 2, "z": 3}, ())
    assert job.tokenizer == Tokenizer(latent_dim=4, size=(8, 8))


def test_one_base_may_be_inherited_twice():
    write("base.yaml", "name: base")
    write("left.yaml", "defaults: base.yaml\nflip: true")
    write("right.yaml", "defaults: base.yaml\nweights: {a: 1}")
    write("run.yaml", "defaults: [left.yaml, right.yaml]")
    assert load(Job, "run.yaml") == Job(name="base", flip=True, weights={"a": 1})


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "tokenizer.latent_dims=32",
            "tokenizer.latent_dims (command line): no such key; did you mean tokenizer.latent_dim?",
        ),
        ("latent_dim=8", "latent_dim (command line): no such key; did you mean tokenizer.latent_dim?"),
        ("tokenizer.flip=true", "tokenizer.flip (command line): no such key; did you mean flip?"),
        ("tokeniser.latent_dim=8", "tokeniser (command line): no such key; did you mean tokenizer?"),
        ("stages.1.image=5", "stages.1.image (command line): no such key; did you mean stages.1.images?"),
        ("images=5", "images (command line): no such key; did you mean stages.0.images?"),
        (
            "tokenizer.head.widht=5",
            "tokenizer.head.widht (command line): no such key; did you mean tokenizer.head.width?",
        ),
        (
            "tokenizer.teacher={kind: random, widht: 3}",
            "tokenizer.teacher.widht (command line): no such key; did you mean tokenizer.teacher.width?",
        ),
        (
            "tokenizer.head.weigth=5",
            "tokenizer.head.weigth (command line): no such key; did you mean tokenizer.head.width?",
        ),
        ("tokenizer.name=x", "tokenizer.name (command line): no such key; did you mean tokenizer.teacher.name?"),
        ("tokenizer.head.qq=5", "tokenizer.head.qq (command line): no such key; valid here: kind, width"),
    ],
)
def test_an_unknown_key_names_the_nearest(override: str, expected: str):
    assert complaint("full.yaml", override) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("tokenizer.latent_dim=many", 'tokenizer.latent_dim (command line): "many" should be a valid integer'),
        (
            "tokenizer.latent_dim.x=3",
            "latent_dim.x (command line): tokenizer.latent_dim is 8 (full.yaml:3), not a section",
        ),
        ("flip.x=3", 'flip (command line): {"x": 3} should be a valid boolean'),
        ("tokenizer.latent_dim=3", "tokenizer.latent_dim (command line): should be even, not 3"),
        ("tokenizer.latent_dim=64", "tokenizer (full.yaml:2): latent_dim 64 exceeds size (4, 4)"),
        ("tokenizer=3", "tokenizer (command line): 3 should be a section of keys"),
        ("tokenizer.size=[1]", "tokenizer.size.1 (command line): this key is required and not given"),
        (
            "tokenizer.teacher.kind=clip",
            "tokenizer.teacher.kind (command line): \"clip\" should be one of 'timm', 'random'",
        ),
        ("tokenizer.teacher={name: x}", "tokenizer.teacher.kind (command line): this key is required and not given"),
        (
            "tokenizer.teacher={kind: timm, timm: x}",
            'tokenizer.teacher.timm (command line): "x" should be a valid integer',
        ),
        ("tokenizer.head.width=-1", "tokenizer.head.width (command line): -1 should be greater than 0"),
        ("stages={}", "stages (command line): {} should be a list"),
        ("stages.2.images=3", "stages.2.images (command line): no such entry; stages has 2 entries (full.yaml:5)"),
        ("stages.last.images=3", "stages.last.images (command line): no such entry; stages has 2 entries"),
        ("stages.0.rate=.inf", "stages.0.rate (command line): Infinity should be a finite number"),
        ("weights.a=b", 'weights.a (command line): "b" should be a valid number'),
        ("name=2024", "name (command line): 2024 should be text; put it in quotes"),
        ("name=null", "name (command line): null should be text"),
        ("steps=[]", "steps (command line): [] should be a valid integer or should be 'auto'"),
        ("name", "name (command line): an override has the form key.path=value"),
        ("=3", "=3 (command line): an override has the form key.path=value"),
        ("tokenizer..size=3", "tokenizer..size=3 (command line): an override has the form key.path=value"),
        (
            "stages=[1",
            "stages=[1 (command line): the value is not YAML: while parsing a flow sequence, expected ',' or ']'",
        ),
        (
            "name=@x",
            "name=@x (command line): the value is not YAML: while scanning for the next token, found character '@'",
        ),
        ("weights={a: 1, a: 2}", "weights={a: 1, a: 2} (command line): the value is not YAML: a is given twice"),
    ],
)
def test_a_wrong_override_is_one_line(override: str, expected: str):
    assert expected in complaint("full.yaml", override)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "name: x\ntokenizer:\n  latent_dims: 3",
            "tokenizer.latent_dims (bad.yaml:3): no such key; did you mean tokenizer.lat",
        ),
        (
            "name: x\ntokenizer:\n  latent_dim:\n    many",
            'tokenizer.latent_dim (bad.yaml:3): "many" should be a valid int',
        ),
        ("name: x\ntokenizer:\n", "tokenizer (bad.yaml:2): null should be a section of keys"),
        (
            "name: x\nstages:\n- images: 1\n- rate: 1",
            "stages.1.images (bad.yaml:4): this key is required and not given",
        ),
        ("flip: true", "name (bad.yaml): this key is required and not given"),
        ("", "name (bad.yaml): this key is required and not given"),
        ("flip: 7\nnames: x", "names (bad.yaml:2): no such key; did you mean name? (and 2 more)"),
        ("- 1\n- 2", "bad.yaml:1: a configuration is a mapping of keys, not [1, 2]"),
        ("name: x\nflip: true\nname: y", "bad.yaml:3: name is given twice, first in line 1"),
        ("name: x\n? [1]\n: y", "bad.yaml:2: a key must be a single word"),
        ("name: x\nstages: [1\nflip: true", "bad.yaml:3: while parsing a flow sequence, expected ',' or ']'"),
        ("name: x\n\tflip: true", "bad.yaml:2: while scanning for the next token, found character '\\t'"),
        ("name: *x", "bad.yaml:1: found undefined alias 'x'"),
        (
            "name: !!python/name:os.system x",
            "bad.yaml:1: a tag (tag:yaml.org,2002:python/name:os.system) cannot be used here",
        ),
        ("name: &x [*x]", "bad.yaml:1: an alias contains itself"),
        ("name: x\n---\nname: y", "bad.yaml:2: expected a single document in the stream, but found another document"),
        ("name: x\0", "bad.yaml: unacceptable character #x0000"),
        ("defaults: none.yaml", "bad.yaml:1: defaults: none.yaml: No such file or directory"),
        ("name: x\ndefaults: 3", "bad.yaml:2: defaults is a path or a list of paths, not 3"),
        ("defaults: bad.yaml", "bad.yaml:1: defaults: a cycle: bad.yaml -> bad.yaml"),
    ],
)
def test_a_wrong_file_is_one_line_with_its_place(text: str, expected: str):
    assert expected in complaint(write("bad.yaml", text))


def test_a_mistake_in_an_inherited_file_is_placed_there():
    write("base/a.yaml", "name: a\ntokenizer:\n  sizes: [1, 1]")
    write("run.yaml", "defaults: base/a.yaml\ntokenizer: {latent_dim: 2}")
    assert complaint("run.yaml") == (
        f"tokenizer.sizes ({Path('base/a.yaml')}:3): no such key; did you mean tokenizer.size?"
    )


def test_a_section_given_twice_is_placed_in_the_file_that_was_asked_for():
    write("base.yaml", "tokenizer: {latent_dim: 64}\nname: base")
    write("run.yaml", "defaults: base.yaml\n\ntokenizer: {size: [2, 2]}")
    assert complaint("run.yaml") == "tokenizer (run.yaml:3): latent_dim 64 exceeds size (2, 2)"


def test_a_cycle_of_files_names_them_in_order():
    write("one.yaml", "name: x\ndefaults: sub/two.yaml")
    write("sub/two.yaml", "defaults: [../one.yaml]")
    assert complaint("one.yaml") == (
        "sub/two.yaml:1: defaults: a cycle: one.yaml -> sub/two.yaml -> sub/../one.yaml".replace("/", os.sep)
    )


def test_files_that_cannot_be_read():
    Path("latin.yaml").write_bytes("name: é".encode("latin-1"))
    assert complaint("none.yaml") == "none.yaml: No such file or directory"
    assert complaint(".") == ".: Is a directory"
    assert complaint("latin.yaml") == "latin.yaml: not UTF-8 text"


class Left(Config):
    kind: Literal["left"]
    net: Timm


class Right(Config):
    kind: Literal["right"]
    net: Stage


class Tree(Config):
    branches: "tuple[Tree, ...]" = ()
    heads: dict[str, Stage] = Field(default_factory=dict)
    leaf: int = 2

    @field_validator("leaf")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"{value} is odd")
        return value


class Either(Config):
    section: Timm | Random | list[Stage] | None = None
    side: Annotated[Left | Right, Field(discriminator="kind")] | None = None
    free: Left | Right | None = None
    pair: tuple[Timm, Stage] | None = None
    milestones: dict[int, float] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("section.widht=3", "section.widht (command line): no such key"),
        ("side={kind: right, net: {images: x}}", 'side.net.images (command line): "x" should be a valid integer'),
        ("free={kind: right, net: {images: x}}", "free.net.images (command line): "),
        ("pair=[{}, {image: 3}]", "pair.1.image (command line): no such key; did you mean pair.1.images?"),
        ("milestones={one: 1}", 'milestones.one (command line): "one" should be a valid integer'),
        ("section=[{image: 3}]", "section.0.image (command line): no such key; did you mean section.0.images?"),
    ],
)
def test_labels_of_union_members_are_no_part_of_the_path(override: str, expected: str):
    with pytest.raises(UserError) as error:
        load(Either, write("empty.yaml", "# nothing\n"), [override])
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("branches=[{laef: 1}]", "branches.0.laef (command line): no such key; did you mean branches.0.leaf?"),
        ("heads.a={images: 1, image: 3}", "heads.a.image (command line): no such key; did you mean heads.a.images?"),
        ("images=3", "images (command line): no such key; valid here: branches, heads, leaf"),
        ("leaf=3", "leaf (command line): 3 is odd"),
    ],
)
def test_models_that_hold_themselves_and_mappings_of_models(override: str, expected: str):
    with pytest.raises(UserError) as error:
        load(Tree, write("empty.yaml", "# nothing\n"), [override])
    assert str(error.value) == expected


def test_dump_is_readable_and_in_model_order():
    assert dump(load(Job, "full.yaml", ["name='010'", "stages.0.rate=1e-7"])) == (
        "name: '010'\ntokenizer:\n  latent_dim: 8\n  size: [4, 4]\n  teacher:\n    kind: timm\n"
        "    name: efficientnet\n    timm: 1\n  head: null\nstages:\n- images: 3\n  rate: 1.0e-07\n"
        "- images: 4\n  rate: 0.0005\nweights: {}\nsteps: auto\nflip: false\n"
    )


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TRAPS = st.sampled_from(
    ["", "no", "null", "~", "1e-4", "1e4", "12e45", "010", "0x1f", "1:30", "2024-01-01", "=", "<<", "- a"]
)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
ANYTHING = st.builds(
    Free,
    text=TEXT | TRAPS,
    number=NUMBER,
    count=st.integers(),
    maybe=st.none() | TEXT | TRAPS,
    texts=st.lists(TEXT | TRAPS, max_size=4).map(tuple),
    mapping=st.dictionaries(TEXT | TRAPS, NUMBER, max_size=3),
)


@given(ANYTHING)
@example(
    Free(
        text="1e4",
        number=1e-5,
        count=-0,
        maybe="é \U0001f600",
        texts=("a " * 200, "a\x85b", "\u2028", "\ufeff", " a\r\n\tb\n"),
        mapping={"x: y": -0.0},
    )
)
def test_a_dump_given_back_is_the_same_configuration(tmp_path_factory: pytest.TempPathFactory, config: Free):
    path = tmp_path_factory.getbasetemp() / "resolved.yaml"
    path.write_text(dump(config), encoding="utf-8")
    again = load(Free, path)
    assert again == config
    assert digest(again) == digest(config)
    assert dump(again) == dump(config)


def test_a_configuration_of_the_package_is_found_by_its_name_and_a_file_of_that_name_goes_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert {"quickstart", "tiny", "imagenet/f16d32", "sweeps/tiny"} <= {*preset_names()}
    assert find_config("imagenet/f16d32") == PRESETS / "imagenet" / "f16d32.yaml"
    Path("quickstart").mkdir()
    assert find_config("quickstart") == PRESETS / "quickstart.yaml", "a run's folder is no configuration"
    Path("tiny").write_text("name: own")
    assert find_config("tiny") == Path("tiny")
    assert find_config("tiny.yaml") == Path("tiny.yaml"), "a path, whether there is a file or not"
    with pytest.raises(
        UserError,
        match=r"^presets/ablation: no such file, .*those are cifar10_cpu, cifar10_cpu_long, imagenet/beyond/",
    ):
        find_config("presets/ablation")
