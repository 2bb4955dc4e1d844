import pathlib

import pages

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_code_of_the_readme_runs():
    names = pages.run(README)
    assert tuple(names["user_embedding"].shape) == (32, 64)
    assert bool(names["queries"].grad.isfinite().all())
