"""What enters a digest, how two configurations are told apart, and how fields can come later."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import create_model

from vavae.config import Config, added, differences, digest, identity, runtime


class Loader(Config):
    batch: int = 8
    workers: int = runtime(2)


class Job(Config):
    seed: int = 0
    loader: Loader = Loader()
    sizes: tuple[int, ...] = (1, 2)


class Blur(Config):
    sigma: float = 1.0
    seed: int = added(0)
    threads: int = runtime(1)


class LaterLoader(Loader):
    shuffle: bool = added(True)
    rate: float | None = added(0.5, neutral=None)


class LaterJob(Job):
    loader: LaterLoader = LaterLoader()
    blur: Blur = added(Blur())
    margin: float | None = added(0.5)


NEUTRAL = LaterJob(loader=LaterLoader(rate=None))


def test_runtime_fields_stay_out_of_the_digest():
    assert identity(Job()) == {"seed": 0, "loader": {"batch": 8}, "sizes": [1, 2]}
    assert digest(Job(loader=Loader(workers=9))) == digest(Job())
    assert digest(Job(loader=Loader(batch=9))) != digest(Job())


def test_differences_name_dotted_paths_and_both_values():
    before, after = Job(), Job(loader=Loader(batch=9, workers=1), sizes=(1,))
    expected = [("loader.batch", 8, 9), ("sizes", [1, 2], [1])]
    assert differences(before, after) == differences(identity(before), identity(after)) == expected
    assert differences(before, before) == []


BLURS = [Blur(), Blur(threads=2), Blur(sigma=2), Blur(seed=1)]
FIELDS: list[tuple[Any, list[Any]]] = [
    (int, [0, 1, -3]),
    (float, [0, 0.0, 1, 0.5]),
    (bool, [False, True]),
    (str | None, [None, "", "a"]),
    (tuple[float, ...], [(), (1, 2), (1.0, 2.5), (1,)]),
    (Blur, BLURS),
    (Blur | None, [None, *BLURS]),
    (tuple[Blur, ...], [(), *((blur,) for blur in BLURS), (*BLURS,)]),
]


@given(st.sampled_from(FIELDS), st.data())
@settings(max_examples=80, deadline=None)
def test_a_later_field_moves_no_digest_at_its_neutral_value_and_always_away_from_it(field, data):
    kind, values = field
    default, neutral, value = (data.draw(st.sampled_from(values)) for _ in range(3))
    without: Any = create_model("Without", __base__=Job)
    later: Any = create_model("Later", __base__=Job, field=(kind, added(default, neutral=neutral)))
    whole: Any = create_model("Whole", __base__=Job, field=(kind, ...))
    before, after = without(seed=3), later(seed=3, field=value)
    is_neutral = identity(whole(field=value)) == identity(whole(field=neutral))
    assert (digest(after) == digest(before)) == is_neutral
    assert (digest({"run": [after]}) == digest({"run": [before]})) == is_neutral
    for stored in (identity(before), identity(later(seed=3, field=neutral))):
        assert (differences(stored, after) == []) == is_neutral
        assert (differences(after, stored) == []) == is_neutral
    assert later.restore(identity(after, with_runtime=True)) == after
    assert identity(later.restore(identity(before))) == identity(before)


def test_what_was_stored_without_a_field_differs_from_its_neutral_value():
    stored = identity(Job())
    assert stored == identity(NEUTRAL)
    assert differences(stored, NEUTRAL) == []
    assert differences(stored, LaterJob()) == [("loader.rate", None, 0.5)]
    changed = LaterJob(loader=LaterLoader(shuffle=False, rate=None), blur=Blur(sigma=2, seed=1), margin=None)
    expected = [("blur.seed", 0, 1), ("blur.sigma", 1, 2), ("loader.shuffle", True, False), ("margin", 0.5, None)]
    assert differences(stored, changed) == expected
    assert differences(identity(changed), NEUTRAL) == [(path, new, old) for path, old, new in expected]
