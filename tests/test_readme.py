import pathlib
import re

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_code_of_the_readme_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert tuple(namespace["user_embedding"].shape) == (32, 64)
    assert bool(namespace["queries"].grad.isfinite().all())
