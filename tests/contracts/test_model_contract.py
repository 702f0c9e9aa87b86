import model_contract
import pytest
from contract import cases
from subjects import models


@pytest.mark.parametrize(("check", "subject"), cases(model_contract, models()))
def test_model(check, subject):
    check(subject)
