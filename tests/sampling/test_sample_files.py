"""The picture of a set of samples: which images it shows."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vavae.sampling.files import SampleRequest, picture_rows, write_picture


def test_a_balanced_set_shows_the_first_of_each_class():
    assert picture_rows([index % 3 for index in range(10)], 2) == [[0, 3], [1, 4], [2, 5]]


def test_rows_are_as_long_as_the_rarest_class_shown_allows():
    assert picture_rows([5, 5, 5, 9, 9], 10) == [[0, 1], [3, 4]]


def test_of_many_classes_a_square_shows_the_first_of_each_of_the_lowest_labels():
    labels = [999 - index % 1000 for index in range(3000)]
    assert picture_rows(labels, 3) == [[999, 998, 997], [996, 995, 994], [993, 992, 991]]
    assert picture_rows([*range(21)], 10) == [[*range(10)], [*range(10, 20)]]
    assert picture_rows([*range(20)] * 2, 10) == [[row, 20 + row] for row in range(20)]


def test_the_picture_of_one_seed_is_a_square_and_that_of_several_has_a_class_a_row(tmp_path):
    for classes, seeds, columns_by_row in ((5, [7], 3 / 2), (2, [7, 8, 9], 3 / 2), (1, [7, 8], 2)):
        images = torch.zeros(classes * len(seeds), 3, 64, 64, dtype=torch.uint8)
        write_picture(tmp_path / "x.png", SampleRequest(range(classes), seeds), [images])
        width, height = Image.open(tmp_path / "x.png").size
        assert round(width / height, 1) == columns_by_row


def test_images_of_one_label_fill_a_square_with_full_rows():
    assert picture_rows([0] * 40, 3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert picture_rows([4] * 7, 3) == [[0, 1, 2], [3, 4, 5]]
    assert picture_rows([4] * 2, 3) == [[0, 1]]


@given(labels=st.lists(st.integers(0, 30), min_size=1, max_size=100), columns=st.integers(1, 5))
def test_every_row_shows_one_class_in_order_where_they_are_few(labels, columns):
    rows = picture_rows(labels, columns)
    assert len({len(row) for row in rows}) == 1
    assert 1 <= len(rows[0]) <= columns
    shown = [{labels[index] for index in row} for row in rows]
    if 1 < len({*labels}) <= 20:
        assert all(len(classes) == 1 for classes in shown)
        assert [min(classes) for classes in shown] == sorted({*labels})
        assert all(row == sorted(row) for row in rows)
    elif len({*labels}) > 20:
        of_each = [labels[index] for row in rows for index in row]
        assert of_each == sorted({*labels})[: len(of_each)]
        assert len(rows) <= columns
