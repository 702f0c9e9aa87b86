import json

import pytest
import torch

import vitrail
from vitrail.app.artefact import Artefact, save
from vitrail.app.build import build_model, count_flops, count_parameters, model_options
from vitrail.data.preprocess import Preprocess
from vitrail.errors import InputError, RunError
from vitrail.runs import RunFolder
from vitrail.training.recipe import EditConfig, ModelConfig


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_edits.py").write_text(
        "import torch\nfrom vitrail.edits.surgery import replace_modules\n"
        "def leaky(slope):\n"
        "    return lambda model: replace_modules(model, lambda _, m: isinstance(m, torch.nn.ReLU),\n"
        "                                         lambda _: torch.nn.LeakyReLU(slope), what='ReLU')\n"
    )
    config = ModelConfig(
        name="small_resnet_nano", img_size=16, edits=[EditConfig(name="my_edits:leaky", options={"slope": 0.2})]
    )
    torch.manual_seed(1)
    model = build_model(config, 3).to(memory_format=torch.channels_last).eval()
    folder = RunFolder(tmp_path / "run")
    artefact = Artefact(
        model=config.name,
        options=model_options(config, 3),
        edits=[edit.model_dump() for edit in config.edits],
        classes=["a", "b", "ç"],
        multilabel=False,
        preprocess=Preprocess((16, 16), mean=(0.5,) * 3, std=(0.5,) * 3),
        temperature=1.5,
    )
    save(folder, model, artefact)
    return folder, model


def test_load_rebuilds_model_edits_and_inputs(run):
    folder, model = run
    loaded = vitrail.load(folder)
    assert any(isinstance(m, torch.nn.LeakyReLU) and m.negative_slope == 0.2 for m in loaded.modules())
    assert loaded.classes == ["a", "b", "ç"]
    assert loaded.temperature == 1.5
    assert loaded.preprocess == Preprocess((16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert not loaded.training
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(loaded(images), model(images), atol=1e-6)


@pytest.mark.parametrize(
    "damage", ["no folder", "empty folder", "no weights", "damaged json", "damaged weights", "other"]
)
def test_a_damaged_run_names_the_file(run, tmp_path, damage):
    folder, _ = run
    path = folder.path
    if damage == "no folder":
        path = tmp_path / "nothing"
    elif damage == "empty folder":
        path = tmp_path / "empty"
        path.mkdir()
    elif damage == "no weights":
        folder.weights.unlink()
    elif damage == "damaged json":
        folder.artefact.write_text('{"model": "small_resnet_nano"}')
    elif damage == "damaged weights":
        folder.weights.write_bytes(folder.weights.read_bytes()[:1000])
    else:
        values = json.loads(folder.artefact.read_text())
        folder.artefact.write_text(json.dumps({**values, "model": "small_resnet_micro"}))
    with pytest.raises((RunError, InputError)) as caught:
        vitrail.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tied_weights_can_be_saved(tmp_path, run):
    _, model = run
    model.layer1[0].conv2.weight = model.layer1[0].conv1.weight
    save(RunFolder(tmp_path / "tied"), model, Artefact.read(run[0]))
    assert (tmp_path / "tied" / "model.safetensors").exists()


def test_counts_are_those_of_a_hand_count():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5))
    assert count_parameters(net) == 108 + 4 * 36 * 5 + 5
    assert count_flops(net, (8, 8)) == 36 * 4 * 27 + 4 * 36 * 5
    assert net.training
