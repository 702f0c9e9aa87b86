import data_contract
import pytest
from contract import cases
from subjects import sources


@pytest.mark.parametrize(("check", "subject"), cases(data_contract, sources()))
def test_data(check, subject):
    check(subject)
