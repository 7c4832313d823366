"""The picture of a set of samples: which images it shows."""

from hypothesis import given
from hypothesis import strategies as st

from vavae.sampling.files import picture_rows


def test_a_balanced_set_shows_the_first_of_each_class():
    assert picture_rows([index % 3 for index in range(10)], 2) == [[0, 3], [1, 4], [2, 5]]


def test_rows_are_as_long_as_the_rarest_class_shown_allows():
    assert picture_rows([5, 5, 5, 9, 9], 10) == [[0, 1], [3, 4]]


def test_of_many_classes_the_lowest_labels_are_shown():
    assert picture_rows([index % 1000 for index in range(3000)], 2) == [[row, 1000 + row] for row in range(20)]


def test_images_of_one_label_fill_a_square_with_full_rows():
    assert picture_rows([0] * 40, 3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert picture_rows([4] * 7, 3) == [[0, 1, 2], [3, 4, 5]]
    assert picture_rows([4] * 2, 3) == [[0, 1]]


@given(labels=st.lists(st.integers(0, 30), min_size=1, max_size=100), columns=st.integers(1, 5))
def test_every_row_shows_one_class_in_order(labels, columns):
    rows = picture_rows(labels, columns)
    assert len({len(row) for row in rows}) == 1
    assert 1 <= len(rows[0]) <= columns
    shown = [{labels[index] for index in row} for row in rows]
    assert all(len(classes) == 1 for classes in shown)
    if len({*labels}) > 1:
        assert [min(classes) for classes in shown] == sorted({*labels})[:20]
    assert all(row == sorted(row) for row in rows)
