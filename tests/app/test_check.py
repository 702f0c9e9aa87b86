import json

import pytest

from vitrail.app.check import check, lines
from vitrail.catalog import card as card_module
from vitrail.checks.check import BASE, BUNDLED, Context, bounded, paired
from vitrail.errors import DataError, InputError

CHECK = """
from vitrail.checks.check import Verdict, paired


def run(ctx):
    (ctx.folder / "drawn.png").write_bytes(b"a picture")
    index = ctx.index()
    epochs = 0.2 if ctx.quick else 3.0
    arms = {
        name: [ctx.train(index, name, seed, {"train.epochs": epochs, "optim.lr": lr}).top1 for seed in ctx.seeds]
        for name, lr in (("high", 3e-3), ("low", 1e-6))
    }
    found = paired("A learning rate that moves beats one that does not.", "top-1", arms, ours="high", against="low")
    return Verdict([found], ["digits"], {"costs": [{"arm": "high", "ms": 1.5}, {"arm": "low", "ms": 2}]})
"""


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A distribution that adds a system with a check."""
    package = tmp_path / "stranger"
    (package / "systems").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "experiment.py").write_text(CHECK)
    (package / "systems" / "strange.toml").write_text(
        'title = "T"\nstage = "method"\nstatus = "works"\nsummary = "S."\ncheck = "stranger.experiment"\n'
    )
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vitrail.systems]\nstranger = stranger\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    card_module.cards.cache_clear()
    yield "strange"
    card_module.cards.cache_clear()


def test_a_quick_check_runs_and_judges_nothing(stranger, tmp_path):
    told = []
    evidence = check(stranger, tell=told.append)
    assert told == ["high, seed 0", "low, seed 0"]
    assert (evidence["mode"], evidence["outcome"], evidence["seeds"]) == ("quick", "not judged", [0])
    assert list(evidence["findings"][0]["arms"]) == ["high", "low"]
    assert "path" not in evidence
    assert "A quick run" in "\n".join(lines(evidence))


def test_a_full_check_judges_and_keeps_its_evidence(stranger, tmp_path):
    evidence = check(stranger, full=True, out=tmp_path / "evidence")
    assert evidence["outcome"] == evidence["findings"][0]["outcome"] == "confirmed"
    assert evidence["seeds"] == [0, 1, 2]
    (file,) = (tmp_path / "evidence").glob("strange-full-*.json")
    kept = json.loads(file.read_text())
    assert file.with_name(f"{file.stem}-drawn.png").read_bytes() == b"a picture"
    assert kept["findings"][0]["arms"]["high"] == evidence["findings"][0]["arms"]["high"]
    assert kept["environment"]["packages"]["torch"]
    shown = "\n".join(lines(evidence))
    assert "A learning rate that moves" in shown
    assert "95 % interval" in shown
    assert "1.5" in shown  # the table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slug": "strnge"}, "strange"),
        ({"slug": "supervised"}, "no check"),
        ({"slug": "strange", "full": True, "seeds": 2}, "3 or more"),
        ({"slug": "strange", "data": "/no/such/folder"}, "nothing at"),
    ],
)
def test_bad_requests_say_what_to_do(stranger, arguments, message):
    with pytest.raises((InputError, DataError), match=message):
        check(**arguments)


def test_outcomes_follow_from_the_interval():
    arms = {"a": [0.9, 0.92, 0.91], "b": [0.8, 0.81, 0.8], "c": [0.95, 0.85, 0.91]}
    better = paired("a beats b", "top-1", arms, ours="a", against="b")
    assert better.outcome == "confirmed"
    assert better.difference == pytest.approx(0.10667, abs=1e-4)
    assert better.interval[0] == pytest.approx(0.10667 - 4.3027 * 0.0057735 / 3**0.5, abs=1e-4)
    assert paired("b beats a", "top-1", arms, ours="b", against="a").outcome == "contradicted"
    assert paired("a has less", "error", arms, ours="a", against="b", higher_is_better=False).outcome == "contradicted"
    assert paired("a beats c", "top-1", arms, ours="a", against="c").outcome == "not seen"
    assert paired("one seed", "top-1", {"a": [1.0], "b": [0.0]}, ours="a", against="b").outcome == "not seen"
    assert bounded("equal", "largest difference", 1e-7, at_most=1e-6).outcome == "confirmed"
    assert bounded("equal", "largest difference", 1e-5, at_most=1e-6).outcome == "contradicted"


def test_settings_of_an_arm_stay_with_that_arm(tmp_path):
    context = Context(True, (0,), tmp_path)
    index = context.index()
    changed = context.recipe(index, {"augment.mixup": 0.3, "method.options": {"smoothing": 0.0}}, seed=4)
    assert (changed.augment.mixup, changed.method.options, changed.train.seed) == (0.3, {"smoothing": 0.0}, 4)
    plain = context.recipe(index, {})
    assert (plain.augment.mixup, plain.train.seed) == (0.0, 0)
    assert "mixup" not in BASE["augment"]
    with pytest.raises(InputError, match="epochs"):
        context.recipe(index, {"train.epoch": 3})


def test_data_that_are_not_installed_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(BUNDLED, "art", ("/no", "some-package"))
    context = Context(True, (0,), tmp_path)
    with pytest.raises(DataError, match="some-package"):
        context.index("art")
    with pytest.raises(InputError, match="digits"):
        context.index("nothing")
