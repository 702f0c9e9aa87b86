import edit_contract
import pytest
from contract import cases
from subjects import edits


@pytest.mark.parametrize(("check", "subject"), cases(edit_contract, edits()))
def test_edit(check, subject):
    check(subject)
