import compressor_contract
import pytest
from contract import cases
from subjects import compressors


@pytest.mark.parametrize(("check", "subject"), cases(compressor_contract, compressors()))
def test_compressor(check, subject):
    check(subject)
