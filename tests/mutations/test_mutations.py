"""The lists of mutations stay true to the code; ``python tests/mutations/mutate.py`` runs them."""

import ast
from pathlib import Path

import pytest
from mutate import ROOT, mutations


@pytest.mark.parametrize("entry", mutations(), ids=lambda entry: f"{entry['system']}-{entry['old'][:40]}")
def test_a_mutation_is_of_the_present_code_and_names_a_test_that_exists(entry):
    text = (ROOT / "src" / "vitrail" / entry["file"]).read_text(encoding="utf-8")
    assert text.count(entry["old"]) == 1
    assert entry["old"] != entry["new"]
    path, _, name = entry["test"].partition("::")
    functions = {
        node.name for node in ast.walk(ast.parse(Path(ROOT, path).read_text())) if isinstance(node, ast.FunctionDef)
    }
    assert name.partition("[")[0] in functions
