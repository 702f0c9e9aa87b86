import os
import platform

from vitrail.app.environment import environment


def test_says_versions_and_nothing_that_names_the_machine():
    values = environment()
    assert values["packages"]["torch"]
    assert values["cores"] >= 1
    assert platform.node() not in str(values) or not platform.node()
    assert os.path.expanduser("~") not in str(values)  # noqa: PTH111
