import pytest

from vitrail.errors import InputError, MissingExtra, require, unknown


def test_unknown_offers_the_nearest_names():
    error = unknown("model", "resnt50", ["resnet50", "vit_tiny", "resnet18"])
    assert isinstance(error, InputError)
    assert "'resnt50'" in str(error)
    assert "'resnet50'" in str(error)
    assert "vit_tiny" not in str(error)


def test_unknown_lists_what_is_allowed_when_nothing_is_near():
    text = str(unknown("stage", "zzz", [f"name{i}" for i in range(20)]))
    assert "name0" in text
    assert "20 in all" in text


def test_missing_extra_names_the_extra():
    with pytest.raises(MissingExtra, match=r"vitrail\[openvino\]"):
        require("no_such_package_here", "openvino")


def test_require_returns_the_module():
    import json

    assert require("json", "none") is json
