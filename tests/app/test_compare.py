import json
import sys

import numpy as np
import pytest
from PIL import Image

from vitrail.app import compare as module
from vitrail.app.compare import BASELINE, arm_folder, compare, parse_arm
from vitrail.app.terminal import comparison_lines
from vitrail.errors import InputError, RunError, VitrailError
from vitrail.training.recipe import Recipe

FAST = (
    "train.epochs=0.5",
    "train.batch_size=32",
    "train.precision=fp32",
    "model.name=small_resnet_nano",
    "model.img_size=16",
)


def run(tmp_path, arms, *more, seeds=1, **options):
    return compare(None, arms, seeds=seeds, out=tmp_path / "c", overrides=(*FAST, *more), **options)


def test_arms_are_paired_judged_and_reported(tmp_path):
    # Long enough that the arm which learns nothing is far behind with either seed.
    arms = ["optim.lr=1e-7", "augment.mixup=0.2,optim.lr=2e-3"]
    found = run(tmp_path, arms, "optim.lr=1e-2", "train.epochs=2", seeds=2)
    names = [arm["name"] for arm in found["arms"]]
    assert names == [BASELINE, "optim.lr=1e-7", "augment.mixup=0.2,optim.lr=2e-3"]
    assert found["seeds"] == [0, 1]
    baseline, still, _ = found["arms"]
    assert baseline["difference"] is None
    assert still["difference"]["mean"] == pytest.approx(still["mean"] - baseline["mean"])
    assert still["difference"]["verdict"] == "worse"
    assert still["difference"]["p_corrected"] >= still["difference"]["p"]
    page = (tmp_path / "c" / "report.html").read_text()
    assert "Against the baseline" in page
    assert "http" not in page.replace("http-equiv", "")
    shown = "\n".join(comparison_lines(found))
    assert "worse" in shown
    plan = json.loads((arm_folder(tmp_path / "c", names[2]) / "plan.json").read_text())
    assert (plan["recipe"]["augment"]["mixup"], plan["recipe"]["optim"]["lr"]) == (0.2, 2e-3)


def test_what_is_done_is_not_done_again_and_seeds_can_be_added(tmp_path, monkeypatch):
    run(tmp_path, ["optim.lr=1e-3"])
    assert not list(tmp_path.rglob("cache")), "what served training alone stays behind"
    done = []
    original = module.run_job
    monkeypatch.setattr(
        module, "run_job", lambda job, *rest: (done.append((job.arm, job.seed)), original(job, *rest))[1]
    )
    run(tmp_path, ["optim.lr=1e-3"])
    assert done == []
    found = run(tmp_path, ["optim.lr=1e-3"], seeds=2)
    assert done == [(BASELINE, 1), ("optim.lr=1e-3", 1)]
    assert [len(arm["values"]) for arm in found["arms"]] == [2, 2]
    with pytest.raises(RunError, match="another comparison"):
        run(tmp_path, ["optim.lr=2e-3"])


def test_an_arm_that_fails_stops_nobody_and_is_tried_again(tmp_path):
    arm = "model.options.no_such_option=1"
    warnings = []
    found = run(tmp_path, [arm, "optim.lr=1e-3"], events=lambda event: warnings.append(event.get("text", "")))
    failed, good = found["arms"][1:]
    assert "no_such_option" in failed["errors"]["0"]
    assert failed["mean"] is None
    assert good["values"]
    assert any("the others go on" in text for text in warnings)
    assert "no_such_option" in (tmp_path / "c" / "report.html").read_text()
    assert "failed" in "\n".join(comparison_lines(found))
    result = arm_folder(tmp_path / "c", arm) / "seed-0" / "result.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), "error": "old"}))
    again = run(tmp_path, [arm, "optim.lr=1e-3"])
    assert "no_such_option" in again["arms"][1]["errors"]["0"]


def test_a_failing_baseline_leaves_the_arms_without_a_difference(tmp_path, monkeypatch):
    original = module._train

    def train(job, *rest):
        if job.arm == BASELINE:
            raise ValueError("broken")
        return original(job, *rest)

    monkeypatch.setattr(module, "_train", train)
    found = run(tmp_path, ["optim.lr=1e-3"])
    assert found["arms"][0]["errors"] == {"0": "ValueError: broken"}
    assert found["arms"][1]["difference"] is None
    assert found["arms"][1]["values"]


def test_arms_are_slugs_recipes_and_changes(tmp_path):
    base = Recipe.from_dict({"data": {"val_fraction": 0.3}, "optim": {"lr": 0.5}})
    name, arm = parse_arm("small_resnet", base)
    assert (name, arm.model.name, arm.optim.lr) == ("small_resnet", "small_resnet_nano", 0.5)
    assert parse_arm("small_resnet:small_resnet_micro", base)[1].model.name == "small_resnet_micro"
    assert parse_arm("supervised", base)[1].method.name == "supervised"
    assert base.model.name == "auto"
    path = tmp_path / "mine.toml"
    path.write_text("[optim]\nlr = 0.1\n[data]\nval_fraction = 0.9\n")
    name, arm = parse_arm(str(path), base)
    # The data are those of the comparison, whatever the file says.
    assert (name, arm.optim.lr, arm.data.val_fraction) == ("mine", 0.1, 0.3)
    listed = parse_arm("augment.scale=[0.1,1.0],optim.lr=2.0", base)[1]
    assert (listed.augment.scale, listed.optim.lr) == ((0.1, 1.0), 2.0)


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (["suprvised"], "'supervised'"),
        (["swav"], "planned"),
        (["small_resnet:huge"], "small_resnet_nano"),
        (["optim.lrr=1"], "lr"),
        (["optim.lr=1", "optim.lr=1"], "twice"),
        (["nothing.toml"], "nothing.toml"),
        ([], "nothing to compare"),
    ],
)
def test_arms_that_cannot_be_are_refused_before_anything_runs(tmp_path, arms, message):
    with pytest.raises(VitrailError, match=message):
        run(tmp_path, arms)
    assert not (tmp_path / "c").exists()


def test_bad_budgets_and_folders(tmp_path):
    with pytest.raises(InputError, match="seeds"):
        run(tmp_path, ["optim.lr=1"], seeds=0)
    with pytest.raises(InputError, match="give more"):
        compare(None, ["optim.lr=1"], seeds=3, minutes=0.1, out=tmp_path / "short")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(RunError, match="not empty"):
        compare(None, ["optim.lr=1"], out=tmp_path / "full", overrides=FAST)


def test_changed_images_are_noticed(tmp_path):
    rng = np.random.default_rng(0)

    def draw(name, number):
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).save(tmp_path / "images" / name / f"{number}.png")

    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(12):
            draw(name, number)
    arguments = {"seeds": 1, "out": tmp_path / "c", "overrides": FAST}
    compare(tmp_path / "images", ["optim.lr=1e-3"], **arguments)
    draw("a", 0)
    with pytest.raises(RunError, match="changed"):
        compare(tmp_path / "images", ["optim.lr=1e-3"], **arguments)


def test_a_budget_is_divided_and_kept(tmp_path):
    found = compare(None, ["optim.lr=1e-3"], seeds=1, minutes=0.5, out=tmp_path / "c", overrides=FAST[1:])
    assert 5 < found["seconds_per_job"] < 13
    epochs = [arm["epochs"] for arm in found["arms"]]
    assert min(epochs) > 0.5
    result = json.loads((arm_folder(tmp_path / "c", BASELINE) / "seed-0" / "result.json").read_text())
    assert result["seconds"] < 1.5 * found["seconds_per_job"]


@pytest.mark.skipif(sys.platform != "linux", reason="local clusters are tested on Linux")
def test_on_a_local_ray_the_result_is_the_same(tmp_path):
    ray = pytest.importorskip("ray")
    here = run(tmp_path / "here", ["optim.lr=1e-3"])
    try:
        there = run(tmp_path / "there", ["optim.lr=1e-3", "model.options.no_such_option=1"], on="ray")
    finally:
        ray.shutdown()
    assert [arm["values"] for arm in there["arms"][:2]] == [arm["values"] for arm in here["arms"]]
    assert "no_such_option" in there["arms"][2]["errors"]["0"]
