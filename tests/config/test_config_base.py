"""What enters a digest, and how two identities are told apart."""

from vavae.config import Config, differences, digest, identity, runtime


class Loader(Config):
    batch: int = 8
    workers: int = runtime(2)


class Job(Config):
    seed: int = 0
    loader: Loader = Loader()
    sizes: tuple[int, ...] = (1, 2)


def test_runtime_fields_stay_out_of_the_digest():
    assert identity(Job()) == {"seed": 0, "loader": {"batch": 8}, "sizes": [1, 2]}
    assert digest(Job(loader=Loader(workers=9))) == digest(Job())
    assert digest(Job(loader=Loader(batch=9))) != digest(Job())


def test_differences_name_dotted_paths_and_both_values():
    before, after = identity(Job()), identity(Job(loader=Loader(batch=9), sizes=(1,)))
    assert differences(before, after) == [("loader.batch", 8, 9), ("sizes", [1, 2], [1])]
    assert differences(before, before) == []
