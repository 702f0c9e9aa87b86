import data_contract
import pytest
from contract import cases, checks_of
from data_contract import Images
from subjects import sources

from vitrail.data.sources import open_source
from vitrail.training.recipe import DataConfig


@pytest.mark.parametrize(("check", "subject"), cases(data_contract, sources()))
def test_data(check, subject):
    check(subject)


@pytest.mark.parametrize("check", checks_of(data_contract))
def test_folders_and_the_embedded_digits(check, shapes):
    for path in (None, str(shapes)):
        check(Images(str(path), lambda path=path: open_source(DataConfig(path=path))))
