import sys

import pytest
import timm
import torch
from torch.overrides import TorchFunctionMode

import vitrail.models
from vitrail.catalog import card as card_module
from vitrail.catalog import cards, find, locate
from vitrail.catalog.card import read_card
from vitrail.errors import InputError, VitrailError


class WithoutValues(TorchFunctionMode):
    """Create on the meta device without the arithmetic of first weights, which have no values there."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if args and getattr(function, "__name__", "") in ("clamp_", "erfinv_", "normal_", "uniform_"):
            return args[0]
        return function(*args, **(kwargs or {}))


GOOD = 'title = "T"\nstage = "edit"\nstatus = "works"\nsummary = "S."\n'


@pytest.mark.parametrize("slug", cards())
def test_what_a_card_promises_can_be_had(slug):
    card = find(slug)
    assert card.summary
    for name in card.provides:
        kind, _, rest = name.partition(":")
        if kind == "timm":
            assert timm.is_model(rest)
        else:
            module = __import__(kind, fromlist=[rest])
            assert callable(getattr(module, rest))
    assert bool(card.example) == (card.status != "planned")
    assert card.check or "baseline" in card.traits or card.status == "planned"


@pytest.mark.parametrize("size", [s for c in cards().values() for s in c.sizes], ids=lambda s: s.name)
def test_published_sizes_hold(size):
    from vitrail.app.build import count_flops, count_parameters

    with torch.device("meta"), WithoutValues():
        model = vitrail.models.create_model(size.name, num_classes=1000)
    # A published 4.7 M stands for anything from 4.65 to 4.75 M.
    half_digit = 0.5 * 10.0 ** -len(str(size.params).partition(".")[2])
    assert count_parameters(model) / 1e6 == pytest.approx(size.params, abs=max(0.01 * size.params, half_digit))
    if size.flops:
        assert count_flops(model, (size.img_size, size.img_size)) / 1e9 == pytest.approx(size.flops, rel=0.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "foo = 1", "'foo'"),
        (GOOD.replace('title = "T"\n', ""), "'title'"),
        (GOOD.replace("works", "finished"), "'status'"),
        (GOOD.replace('"edit"', '"edits"'), "'stage'"),
        (GOOD.replace("works", "partial"), "'missing'"),
        (GOOD + "year = 'MMXX'", "'year'"),
        (GOOD + "tasks = ['cooking']", "'cooking'"),
        (GOOD.replace("works", "planned") + "provides = ['a:b']", "'status'"),
        (GOOD + "[[claims]]\ntext = 'x'", "claims.0.source"),
        (GOOD + "sizes = 3", "'sizes'"),
        ("title = ", "cannot read"),
    ],
)
def test_a_wrong_card_names_file_and_key(tmp_path, text, message):
    path = tmp_path / "broken_card.toml"
    path.write_text(text)
    with pytest.raises(VitrailError) as caught:
        read_card(path)
    assert "broken_card.toml" in str(caught.value)
    assert message in str(caught.value)


def test_unknown_slug_offers_the_nearest():
    with pytest.raises(InputError, match="'supervised'"):
        find("suprvised")


def test_a_recipe_names_a_part_of_a_system():
    assert locate("supervised:supervised_loss", "method").__name__ == "supervised_loss"
    with pytest.raises(InputError, match="'Supervised'"):
        locate("supervised:Supervisd", "method")


def test_a_part_may_be_of_another_stage_than_its_system():
    assert locate("groupmamba:TwoHeadDistillation", "method").__name__ == "TwoHeadDistillation"
    assert locate("mambaeye:MambaEyeTraining", "method").__name__ == "MambaEyeTraining"
    for name in ("groupmamba", "groupmamba:groupmamba_nano"):
        with pytest.raises(InputError, match="'groupmamba' is a system of stage 'model', and a method is needed"):
            locate(name, "method")


def test_planned_systems_say_so():
    slug = next(card.slug for card in cards().values() if card.status == "planned")
    with pytest.raises(InputError, match=r"planned|is a system of stage"):
        locate(slug, cards()[slug].stage)


@pytest.mark.parametrize("name", ["small_resnet", "no.such.module:x", "json:nothing"])
def test_locate_explains_what_cannot_be_used(name):
    with pytest.raises(InputError, match=name.split(":")[0]):
        locate(name, "method")


def test_other_distributions_add_cards(tmp_path, monkeypatch):
    package = tmp_path / "stranger"
    (package / "systems").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('finding a card must not run the package')")
    (package / "systems" / "strange_edit.toml").write_text(GOOD)
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vitrail.systems]\nstranger = stranger\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    card_module.cards.cache_clear()
    try:
        assert "strange_edit" in cards()
    finally:
        card_module.cards.cache_clear()
        sys.modules.pop("stranger", None)
