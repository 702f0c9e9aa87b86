import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.inception_next import InceptionDWConv2d

from vitrail.errors import InputError
from vitrail.models import create_model
from vitrail.models.inception_next import InceptionNeXt, checkpoint_filter_fn

TINY = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (45, 61), (1, 3)])
def test_images_are_filled_to_whole_places(size):
    torch.manual_seed(0)
    model = create_model("inception_next_nano", num_classes=3).eval()
    x = torch.randn(2, 3, *size)
    height, width = (-(-side // 16) * 16 for side in size)
    filled = torch.zeros(2, 3, height, width)
    filled[..., : size[0], : size[1]] = x
    assert model.forward_features(x).shape == (2, 128, height // 16, width // 16)
    torch.testing.assert_close(model(x), model(filled))
    stem = F.conv2d(filled, model.stem[0].weight, model.stem[0].bias, stride=2)
    torch.testing.assert_close(model.stem[0](x), stem)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_strides_are_as_declared(stride):
    model = InceptionNeXt(stem_stride=stride, num_classes=0, **TINY).eval()
    assert [info["reduction"] for info in model.feature_info] == [stride, 2 * stride, 4 * stride, 8 * stride]
    found = model.forward_intermediates(torch.zeros(1, 3, 33, 64), intermediates_only=True)
    sizes = [(-(-33 // (8 * stride)) * 8 // 2**stage, 64 // stride // 2**stage) for stage in range(4)]
    assert [tuple(value.shape[-2:]) for value in found] == sizes


def test_with_the_published_stem_it_is_timms_net():
    torch.manual_seed(0)
    ours = InceptionNeXt(num_classes=5, **TINY).eval()
    theirs = timm.models.inception_next.MetaNeXt(num_classes=5, **TINY).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(ours(x), theirs(x))
    assert float(ours.stem[0].weight.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert not ours.stem[0].bias.any()


def test_the_nano_has_the_bands_of_atto():
    model = create_model("inception_next_nano", num_classes=10)
    mixers = [module for module in model.modules() if isinstance(module, InceptionDWConv2d)]
    assert [mixer.dwconv_w.kernel_size for mixer in mixers] == [(1, 9)] * 5
    assert next(mixer.split_indexes for mixer in mixers) == (4, 4, 4, 4)


def test_features_come_without_pooling():
    model = InceptionNeXt(num_classes=0, global_pool="", **TINY).eval()
    x = torch.zeros(1, 3, 64, 96)
    assert model(x).shape == (1, 16, 2, 3)
    model.reset_classifier(4)
    assert (model(x).shape, model.global_pool) == ((1, 4), "avg")


def test_the_authors_checkpoints_are_unpacked():
    model = InceptionNeXt(num_classes=5, **TINY)
    state = model.state_dict()
    for given in (state, {"state_dict": state}, {f"module.{key}": value for key, value in state.items()}):
        model.load_state_dict(checkpoint_filter_fn(given, model), strict=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem_stride": 3}, "stem_stride = 3 .*1, 2 or 4"),
        ({"dims": (8, 8)}, r"dims = \(8, 8\) .*each of 1 to 4 stages"),
        ({"depths": (1,) * 5, "dims": (8,) * 5}, "1 to 4 stages"),
        ({"global_pool": "median"}, "global_pool = 'median' .*avg, max"),
        ({"global_pool": ""}, "global_pool = '' .*num_classes = 0"),
    ],
)
def test_options_that_do_not_fit_are_explained(options, message):
    with pytest.raises(InputError, match=message):
        InceptionNeXt(**{**TINY, **options})


def test_a_pooling_without_classifier_is_refused_later_too():
    with pytest.raises(InputError, match=r"global_pool = '' .*num_classes = 0"):
        InceptionNeXt(num_classes=2, **TINY).reset_classifier(2, "")
