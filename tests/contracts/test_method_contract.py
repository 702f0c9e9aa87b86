import method_contract
import pytest
from contract import cases
from subjects import methods


@pytest.mark.parametrize(("check", "subject"), cases(method_contract, methods()))
def test_method(check, subject):
    check(subject)
