import pytest
import suite_contract
from contract import cases
from subjects import suites


@pytest.mark.parametrize(("check", "subject"), cases(suite_contract, suites()))
def test_suite(check, subject):
    check(subject)
