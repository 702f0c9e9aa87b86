import ast
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vitrail
from vitrail.catalog import recipe_names
from vitrail.catalog.shipped import FOLDER
from vitrail.errors import InputError
from vitrail.models import model_names
from vitrail.training.recipe import Recipe, apply_overrides, recipe_keys


def make(*overrides: str) -> Recipe:
    return Recipe.from_dict(apply_overrides({}, overrides))


def test_round_trip_through_toml(tmp_path):
    recipe = make("optim.lr=1e-3", 'data.path="photos"', "model.edits=[{name='x',options={k=3}}]", "train.epochs=2.5")
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    assert Recipe.load(path) == recipe


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("optim.lrr=1", "'optim.lr'"),
        ("lr=1", "'optim.lr'"),
        ("trian.epochs=1", "'train'"),
        ("optim.lr=-1", "greater than 0"),
        ("train.batch_size=many", "integer"),
        ("augment.scale=[1]", "augment.scale"),
        ("optim=3", "optim"),
        ("foo=1", "train"),
        ("data.near_duplicates=sometimes", "group"),
        ("model.edits=[{nam='x'}]", "name"),
    ],
)
def test_a_wrong_entry_names_the_key_and_what_is_allowed(override, text):
    with pytest.raises(InputError) as caught:
        make(override)
    assert text in str(caught.value)
    assert override.split("=")[0].split(".")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["optim.lr", "=3", "optim.lr.deep=3"])
def test_a_malformed_override_is_explained(override):
    with pytest.raises(InputError):
        apply_overrides({"optim": {"lr": 1}}, [override])


def test_overrides_do_not_touch_the_given_values():
    values = {"optim": {"lr": 1.0}}
    apply_overrides(values, ["optim.lr=2.0", "train.epochs=1"])
    assert values == {"optim": {"lr": 1.0}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("true", True),
        ("none", "none"),
        ('"a b"', "a b"),
        ("a/b c", "a/b c"),
        ("[1, 2]", [1, 2]),
    ],
)
def test_values_are_read_as_toml_or_text(text, value):
    assert apply_overrides({}, [f"x={text}"]) == {"x": value}


def test_broken_toml_and_missing_file_name_the_file(tmp_path):
    with pytest.raises(InputError, match=r"no\.toml"):
        Recipe.load(tmp_path / "no.toml")
    with pytest.raises(
        InputError, match=r"cannot read the recipe diet3: .* name of a shipped recipe: deit3, deit3_fine"
    ):
        Recipe.load("diet3")
    (tmp_path / "bad.toml").write_text("[optim\n")
    with pytest.raises(InputError, match=r"bad\.toml"):
        Recipe.load(tmp_path / "bad.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xff")
    with pytest.raises(InputError, match="UTF-8"):
        Recipe.load(tmp_path / "bytes.toml")


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_loads_by_its_name_and_says_how_long_to_train(name):
    recipe = Recipe.load(name, ["train.batch_size=8"])
    assert recipe.train.batch_size == 8
    assert {recipe.train.epochs, recipe.optim.lr, recipe.model.name, recipe.augment.policy}.isdisjoint({"auto"})
    assert recipe.model.name in model_names()
    assert (FOLDER / f"{name}.toml").read_text(encoding="utf-8").startswith("# ")


def test_a_file_comes_before_a_shipped_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = recipe_names()[0]
    (tmp_path / name).mkdir()
    shipped = Recipe.load(name)
    (tmp_path / name).rmdir()
    (tmp_path / name).write_text("minutes = 3.0\n")
    assert (shipped.minutes, Recipe.load(name).minutes) == (None, 3.0)


def test_seed_sets_the_training_seed_alone():
    recipe = make("seed=5")
    assert recipe.train.seed == 5
    assert recipe.data.seed == 0


@given(st.floats(1e-6, 1.0), st.integers(1, 4096), st.sampled_from(["fp32", "bf16"]))
def test_any_valid_value_survives_toml(lr, batch, precision):
    recipe = make(f"optim.lr={lr!r}", f"train.batch_size={batch}", f"train.precision={precision}")
    assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe


def test_every_recipe_entry_is_read_by_something():
    read = set()
    for path in Path(vitrail.__file__).parent.rglob("*.py"):
        if path.name != "recipe.py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute):
                    read.add(node.attr)
    unread = [key for key in recipe_keys() if key.rsplit(".", 1)[-1] not in read and key != "seed"]
    assert not unread
