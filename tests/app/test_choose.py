import pytest
import torch

from vitrail.app.choose import recommend
from vitrail.app.plan import resolve
from vitrail.errors import InputError
from vitrail.models.factory import model_names
from vitrail.training.recipe import Recipe, recipe_keys

CASES = {
    "clip art": {"n_train": 4500, "n_classes": 60, "median_side": 300, "pretrained_available": True},
    "photos, no weights": {"n_train": 4500, "n_classes": 60, "median_side": 300, "pretrained_available": False},
    "fashion": {"n_train": 60000, "n_classes": 10, "median_side": 28, "pretrained_available": True},
    "digits": {"n_train": 1617, "n_classes": 10, "median_side": 8, "pretrained_available": False},
    "one image": {"n_train": 1, "n_classes": 2, "median_side": 1, "pretrained_available": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seconds", [1.0, 240.0, 36000.0])
def test_every_open_field_but_the_epochs_gets_a_valid_value(case, seconds):
    values = recommend(**CASES[case], train_seconds=seconds)
    assert set(Recipe().unresolved()) - set(values) <= {"train.epochs"}
    assert set(values) <= set(recipe_keys())
    nested = {}
    for key, value in values.items():
        section, name = key.split(".")
        nested.setdefault(section, {})[name] = value
    recipe = Recipe.from_dict(nested)
    assert recipe.model.name in model_names()
    assert float(recipe.train.head_start) <= seconds


def test_digits_are_not_mirrored_and_small_images_need_no_big_net():
    digits, fashion = (recommend(**CASES[name], train_seconds=60) for name in ("digits", "fashion"))
    assert digits["augment.flip"] == 0
    assert (digits["model.name"], digits["model.img_size"]) == ("small_resnet_nano", 16)
    assert (fashion["model.name"], fashion["model.img_size"]) == ("small_resnet_micro", 28)


def test_little_time_means_fewer_pixels():
    sizes = [recommend(**CASES["clip art"], train_seconds=s)["model.img_size"] for s in (60, 3600)]
    assert sizes == [160, 224]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator computes in fp16")
def test_fp16_is_refused_before_anything_is_measured():
    index = None  # not asked for anything
    with pytest.raises(
        InputError, match=r"train\.precision = 'fp16' cannot be used on 'cpu'; .*--set train\.precision"
    ):
        resolve(Recipe.from_dict({"train": {"precision": "fp16"}}), index, 8, None, print)
