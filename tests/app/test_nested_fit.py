"""``vitrail fit --matryoshka``: nested embeddings, and what they are worth at each dimension."""

import pytest
import torch
from PIL import Image

import vitrail
from vitrail.app.finish import _for_seconds
from vitrail.app.fit import NESTED_METHOD, request
from vitrail.edits.nested_head import nested_embeddings
from vitrail.errors import InputError
from vitrail.layers.nested import nested_classifier
from vitrail.training.recipe import EditConfig

FEW = (
    "train.epochs=2",
    "train.batch_size=16",
    "train.precision=fp32",
    "model.name=small_resnet_nano",
    "model.img_size=16",
    "model.pretrained=none",
    "deploy.compile=false",
    "deploy.openvino=false",
    "deploy.int8=false",
    "evaluate.corruptions=false",
    "data.val_fraction=0.25",
)


def asked(recipe=None, *overrides):
    return request(None, minutes=1, target_ms=None, matryoshka=True, recipe=recipe, overrides=overrides)


def test_the_flag_is_short_for_an_edit_and_a_method():
    plain = asked()
    assert plain.method.name == NESTED_METHOD
    assert [edit.name for edit in plain.model.edits] == ["mrl"]
    own = asked(
        None, 'model.edits=[{name="ggem"},{name="mrl:nested_head",options={dims=[4]}}]', "method.name=supervised"
    )
    assert [edit.name for edit in own.model.edits] == ["ggem", "mrl:nested_head"]
    assert asked(own) == own
    more = asked(None, 'model.edits=[{name="ggem"}]')
    assert more.model.edits == [EditConfig(name="ggem"), EditConfig(name="mrl")]
    with pytest.raises(InputError, match="mrl:MatryoshkaTraining, not by nkd_uskd: leave out one"):
        asked(None, "method.name=nkd_uskd")


def test_a_run_says_what_each_dimension_is_worth(shapes, tmp_path):
    summary = vitrail.fit(shapes, out=tmp_path / "run", matryoshka=True, overrides=FEW)
    table = summary["nested"]["table"]
    assert [row["dim"] for row in table] == [8, 16, 32, 64, 128]
    assert [row["bytes"] for row in table] == [32, 64, 128, 256, 512]
    assert table[-1]["top1"] == pytest.approx(summary["top1"])
    assert all(0 <= row[name] <= 1 for row in table for name in ("top1", "neighbour_top1"))
    assert summary["nested"]["images"] == summary["n_eval"]
    assert summary["nested"]["database"] == summary["n_train"]
    assert "As few numbers as it takes" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    model = vitrail.load(tmp_path / "run")
    assert nested_classifier(model).dims == (8, 16, 32, 64, 128)
    picture = model.preprocess(Image.open(next(shapes.rglob("*.png"))).convert("RGB"))
    pixels = torch.from_numpy(model.preprocess.normalise(picture))[None]
    assert nested_embeddings(model, pixels, 8).shape == (1, 8)


def test_the_seconds_bound_what_is_seen():
    batches = [1, 2, 3]
    assert list(_for_seconds(lambda: iter(batches), 60.0)) == batches
    assert list(_for_seconds(lambda: iter(batches), -1.0)) == [1]
