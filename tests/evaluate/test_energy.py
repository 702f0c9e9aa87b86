import pytest
import torch
from torch import nn

from vitrail.errors import InputError
from vitrail.evaluate import energy
from vitrail.evaluate.energy import JOULES_PER_BYTE, JOULES_PER_MAC, Rapl, counter, measure_energy, work


def domain(root, name, joules, most=10_000_000):
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "energy_uj").write_text(f"{joules}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    return folder / "energy_uj"


def test_rapl_adds_up_packages_and_comes_round(tmp_path):
    one = domain(tmp_path, "intel-rapl:0", 9_000_000)
    two = domain(tmp_path, "intel-rapl:1", 500)
    domain(tmp_path, "intel-rapl:0:0", 7)  # a part of the first
    domain(tmp_path, "intel-rapl-mmio:0", 7)  # the same package again
    meter = Rapl(tmp_path)
    assert len(meter.domains) == 2
    one.write_text("9500000")
    two.write_text("1500500")
    assert meter.read() == pytest.approx(2.0)
    one.write_text("500000")
    assert meter.read() == pytest.approx(3.0)
    assert meter.read() == pytest.approx(3.0)


def test_a_counter_that_cannot_be_read_is_none(tmp_path):
    assert counter(torch.device("cpu"), tmp_path / "absent") is None
    (tmp_path / "intel-rapl:0").mkdir()
    assert counter(torch.device("cpu"), tmp_path) is None
    domain(tmp_path, "intel-rapl:1", 5)
    assert counter(torch.device("cpu"), tmp_path)[0] == "rapl"
    assert counter(torch.device("meta"), tmp_path) is None


def net():
    return nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.Flatten(), nn.Linear(24, 5))


def test_work_is_what_layers_compute_and_move():
    macs, moved = work(net(), torch.zeros(2, 4, 5, 5))
    assert macs == 6 * 4 * 2 * 9 + 24 * 5
    values = 2 * (4 * 25 + 24 + 24 + 5)
    weights = 6 * 2 * 9 + 24 * 5
    assert moved == 4 * (values + weights) / 2
    model = net()
    work(model, torch.zeros(1, 4, 5, 5))
    assert not any(layer._forward_hooks for layer in model)


def test_the_proxy_is_the_price_of_the_work(tmp_path):
    model, images = net().train(), torch.zeros(2, 4, 5, 5)
    found = measure_energy(model, images, root=tmp_path)
    assert found.source == "proxy"
    assert found.joules == pytest.approx(JOULES_PER_MAC * found.macs + JOULES_PER_BYTE * found.bytes)
    assert (found.macs, found.bytes) == work(model, images)
    assert model.training


def test_a_counter_is_divided_by_images_and_passes(tmp_path, monkeypatch):
    place = domain(tmp_path, "intel-rapl:0", 0)
    model = net()
    model.register_forward_hook(lambda *_: (place.write_text(str(int(place.read_text()) + 600_000)), None)[1])
    found = measure_energy(model, torch.zeros(2, 4, 5, 5), repeats=3, root=tmp_path)
    assert found.source == "rapl"
    assert found.joules == pytest.approx(0.3)
    assert energy.RAPL.name == "powercap"


def test_no_pass_and_no_image_are_refused():
    with pytest.raises(InputError, match="repeats = 0"):
        measure_energy(net(), torch.zeros(2, 4, 5, 5), repeats=0)
    with pytest.raises(InputError, match="with 0 images"):
        measure_energy(net(), torch.zeros(0, 4, 5, 5))
