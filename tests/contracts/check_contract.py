"""What every check promises: an experiment on the public interface that runs through and says plain things."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from dataclasses import asdict, dataclass, field
from types import ModuleType

from contract import slow

from vitrail.catalog import cards
from vitrail.checks.check import Verdict


@dataclass(frozen=True)
class Check:
    """A check by its module."""

    name: str
    module: str
    provides: tuple[str, ...] = ()
    traits: frozenset[str] = field(default_factory=frozenset)

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)

    def verdict(self) -> Verdict:
        from once import quick_run  # pytest alone finds it: what runs the contracts as a script has no checks

        return quick_run(self.load())[0]


def it_takes_a_context_alone(subject: Check) -> None:
    run = getattr(subject.load(), "run", None)
    assert inspect.isfunction(run), "its module has no function run(ctx)"
    needed = [name for name, p in inspect.signature(run).parameters.items() if p.default is inspect.Parameter.empty]
    assert len(needed) == 1, f"run takes {needed} in place of the context alone"


def it_uses_the_public_interface(subject: Check) -> None:
    tree = ast.parse(inspect.getsource(subject.load()))
    foreign = {
        path.partition(":")[0]: card.slug
        for card in cards().values()
        if "baseline" not in card.traits
        for path in card.provides
        if path not in subject.provides and not path.startswith("timm:")
    }
    own = {path.partition(":")[0] for path in subject.provides}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            module = getattr(node, "module", None) or ""
            names = [alias.name for alias in node.names]
            private = [name for name in [*module.split("."), *names] if name.startswith("_") and name != "__future__"]
            assert not private, f"line {node.lineno} imports the private {private}"
            for path in {module, *(f"{module}.{name}" if module else name for name in names)}:
                assert not path.startswith("vitrail.checks.") or path.startswith("vitrail.checks.check"), (
                    f"line {node.lineno} imports another check, {path}"
                )
                assert path not in foreign or path in own, (
                    f"line {node.lineno} imports {path} of the system {foreign[path]}: name it in an arm's settings"
                )
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            raise AssertionError(f"line {node.lineno} uses the private {node.attr}")


@slow
def its_findings_are_sound(subject: Check) -> None:
    verdict = subject.verdict()
    assert isinstance(verdict, Verdict), f"run returns a {type(verdict).__name__} in place of a Verdict"
    assert verdict.findings, "the verdict has no finding"
    for finding in verdict.findings:
        assert finding.claim and finding.quantity, "a finding does not say what was claimed or measured"
        assert finding.outcome in ("confirmed", "not seen", "contradicted"), f"{finding.outcome!r} is no outcome"
        assert finding.arms, f"nothing was measured of {finding.claim!r}"
        counts = {name: len(values) for name, values in finding.arms.items()}
        assert len(set(counts.values())) == 1 and all(counts.values()), (
            f"the arms of {finding.claim!r} have different numbers of values: {counts}"
        )
    compared = [len(finding.arms) for finding in verdict.findings]
    assert max(compared) > 1 or all(finding.interval is None for finding in verdict.findings), "nothing is compared"


@slow
def its_verdict_is_json(subject: Check) -> None:
    values = asdict(subject.verdict())
    assert json.loads(json.dumps(values, allow_nan=False)), "the verdict is empty"
    for name, rows in subject.verdict().tables.items():
        assert all(list(row) == list(rows[0]) for row in rows), f"the rows of the table {name!r} have different keys"
