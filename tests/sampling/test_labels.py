"""Which class an image shows: balanced, random or given."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vavae.errors import UserError
from vavae.sampling.config import SampleConfig
from vavae.sampling.labels import find_classes, label_law

CLASSES = ("cat", "dog", "fish")
SEED = 3


def labels(mode, count, classes=CLASSES, seed=SEED):
    law = label_law(SampleConfig(labels=mode), classes, seed)
    return [law(index) for index in range(count)]


def test_balanced_labels_take_turns():
    assert labels("class_balanced", 7) == [0, 1, 2, 0, 1, 2, 0]


def test_given_labels_take_turns_in_their_order():
    assert labels(("fish", 0, "fish"), 5) == [2, 0, 2, 2, 0]


def test_random_labels_are_even_but_not_balanced():
    count = 3000
    counts = np.bincount(labels("random", count), minlength=3)
    assert counts.sum() == count
    assert 0 < np.abs(counts - count / 3).max() < 5 * (count * 2 / 9) ** 0.5


@given(index=st.integers(0, 10**9))
def test_a_random_label_is_a_function_of_seed_and_index(index):
    laws = [label_law(SampleConfig(labels="random"), CLASSES, SEED) for _ in range(2)]
    laws[0](index + 1)
    assert laws[0](index) == laws[1](index)


@pytest.mark.parametrize("mode", ["class_balanced", "random"])
def test_without_classes_every_label_is_the_null_label(mode):
    assert labels(mode, 3, classes=()) == [0, 0, 0]
    with pytest.raises(UserError, match=r"sample.labels: the images have no classes: leave it out"):
        labels(("cat",), 1, classes=())


def test_another_seed_draws_other_labels():
    assert labels("random", 50) != labels("random", 50, seed=4)


@pytest.mark.parametrize(
    ("classes", "wanted", "found"),
    [
        (CLASSES, ["dog", "2", 0], [1, 2, 0]),
        (("0", "1", "10", "2"), ["10", 2, "3"], [2, 3, 3]),  # names as they sort: they win over the number
        (("tench, Tinca tinca", "n01440764"), ["n01440764", 0], [1, 0]),
    ],
)
def test_classes_go_by_name_or_number(classes, wanted, found):
    assert find_classes(wanted, classes, "here") == found


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        ("cta", "here: 'cta' is none of the 3 classes: give a number from 0 to 2 or a name; did you mean cat?"),
        ("3", "here: '3' is none of the 3 classes: give a number from 0 to 2 or a name, such as cat"),
        ("-1", "here: '-1' is none of the 3 classes: give a number from 0 to 2 or a name, such as cat"),
        ("", "here: '' is none of the 3 classes: give a number from 0 to 2 or a name, such as cat"),
        ("²", "here: '²' is none of the 3 classes: give a number from 0 to 2 or a name, such as cat"),
    ],
)
def test_no_such_class_is_one_line(wanted, line):
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        find_classes([wanted], CLASSES, "here")


def test_the_configuration_names_its_key():
    with pytest.raises(UserError, match=r"^sample\.labels: 'bird' is none of the 3 classes"):
        labels(("bird",), 1)


@pytest.mark.parametrize(
    ("mode", "classes", "words"),
    [
        ("class_balanced", 1000, "50,000 class-balanced samples"),
        ("class_balanced", None, "50,000 class-balanced samples"),
        ("class_balanced", 60_000, "50,000 samples, one of each of the first 50,000 of 60,000 classes"),
        ("class_balanced", 0, "50,000 samples"),
        ("random", 0, "50,000 samples"),
        ("random", 1000, "50,000 randomly labelled samples"),
        ((1, "cat"), 1000, "50,000 samples of 2 given labels"),
    ],
)
def test_the_mode_in_words(mode, classes, words):
    assert SampleConfig(labels=mode).in_words(50_000, classes) == words


def test_samples_that_no_class_has_equally_many_of_say_so():
    assert SampleConfig().in_words(2_500, 1_000) == "2,500 class-balanced samples (2 or 3 of a class)"
    assert SampleConfig().in_words(8, len(CLASSES)) == "8 class-balanced samples (2 or 3 of a class)"
    assert np.bincount(labels("class_balanced", 8)).tolist() == [3, 3, 2]
