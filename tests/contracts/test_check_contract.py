import check_contract
import pytest
from contract import cases
from subjects import checks


@pytest.mark.parametrize(("check", "subject"), cases(check_contract, checks()))
def test_check(check, subject):
    check(subject)
