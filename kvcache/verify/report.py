"""Reports: an object, text, JSON, and XML of JUnit."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeAlias

from .judge import Divergence
from .operations import Script, describe

Verdict: TypeAlias = Literal["equal", "within noise", "different", "failed", "not supported"]
_ORDER: tuple[Verdict, ...] = ("not supported", "equal", "within noise", "different", "failed")


@dataclass(frozen=True)
class Finding:
    """A fault, and the shortest conversation found that shows it.

    run: number of the conversation that showed it first. script: the shortest one. divergence: the
    first wrong token in that, None if an operation failed; `message` says how. layer: the first
    layer whose hidden states are wrong, None where that is not known.
    """

    run: int
    script: Script
    divergence: Divergence | None = None
    message: str = ""
    layer: int | None = None

    @property
    def summary(self) -> str:
        """One line of text."""
        if self.divergence is None:
            return self.message
        layer = "" if self.layer is None else f"; first wrong in layer {self.layer}"
        return f"{self.divergence}{layer}"


@dataclass
class ScenarioResult:
    """The verdict on one scenario.

    runs: conversations. equal: those of them that were equal bit for bit. compared: passes compared
    with cold runs. reused: tokens not computed. refused: operations that the cache said it cannot
    do in the state that it had. largest: difference of logits to a cold run of the same passes.
    reason: what the target lacks, for "not supported". finding: the fault, if there is one.
    """

    scenario: str
    verdict: Verdict = "equal"
    runs: int = 0
    equal: int = 0
    compared: int = 0
    reused: int = 0
    refused: int = 0
    largest: float = 0.0
    reason: str = ""
    seconds: float = 0.0
    finding: Finding | None = None

    def worsen(self, verdict: Verdict) -> None:
        """Take over `verdict` if it is worse."""
        self.verdict = max(self.verdict, verdict, key=_ORDER.index)


@dataclass
class Report:
    """The verdicts on a target.

    kernel_noise: largest difference of logits of equal tokens computed without a cache in passes of
    several lengths; None for a target that cannot. chunking_noise: the same over fresh caches, in
    passes of several sizes. bound: the largest difference that counts as noise.
    """

    target: str
    seed: int
    kernel_noise: float | None
    chunking_noise: float
    bound: float
    results: list[ScenarioResult] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no scenario found a fault."""
        return not self.faults

    @property
    def faults(self) -> list[ScenarioResult]:
        """The scenarios that found one."""
        return [result for result in self.results if result.finding is not None]

    def to_text(self) -> str:
        """Return the report as lines of text."""
        lines = [f"{self.target} (seed {self.seed}): {self.noise_text()}"]
        lines += [
            f"{result.scenario:16} {result.verdict:14} {details(result)}" for result in self.results
        ]
        for result in self.faults:
            if result.finding is not None:
                lines += ["", f"{result.scenario}: {result.finding.summary}"]
                lines += [f"    {line}" for line in describe(result.finding.script)]
        return "\n".join(lines)

    def noise_text(self) -> str:
        """Return a sentence about noise."""
        chunking = f"cold runs in passes of other sizes differ by {self.chunking_noise:.2g}"
        if self.kernel_noise is None:
            return f"{chunking}; up to {self.bound:.2g} counts as noise"
        kernel = f"without a cache by {self.kernel_noise:.2g}"
        return f"{chunking}, {kernel}; up to {self.bound:.2g} counts as noise"

    def to_json(self) -> str:
        """Return the report as JSON, scripts as lines of Python."""
        content = asdict(self) | {"passed": self.passed}
        for record, result in zip(content["results"], self.results, strict=True):
            if result.finding is not None:
                record["finding"]["script"] = describe(result.finding.script)
                record["finding"]["summary"] = result.finding.summary
        return json.dumps(content, indent=2)

    def to_junit(self) -> str:
        """Return the report as XML of JUnit, a test case for each scenario."""
        return junit([self])


def junit(reports: list[Report]) -> str:
    """Return XML of JUnit with a test suite for each of `reports`."""
    root = ET.Element("testsuites")
    for report in reports:
        skipped = sum(result.verdict == "not supported" for result in report.results)
        suite = ET.SubElement(
            root,
            "testsuite",
            name=f"kvcache verify {report.target}",
            tests=str(len(report.results)),
            failures=str(len(report.faults)),
            errors="0",
            skipped=str(skipped),
        )
        for result in report.results:
            _add_case(suite, report, result)
    return ET.tostring(root, encoding="unicode", xml_declaration=True)


def _add_case(suite: ET.Element, report: Report, result: ScenarioResult) -> None:
    case = ET.SubElement(
        suite,
        "testcase",
        classname=report.target,
        name=result.scenario,
        time=f"{result.seconds:.3f}",
    )
    if result.finding is not None:
        failure = ET.SubElement(case, "failure", message=result.finding.summary)
        failure.text = "\n".join(describe(result.finding.script))
    elif result.verdict == "not supported":
        ET.SubElement(case, "skipped", message=details(result))


def details(result: ScenarioResult) -> str:
    """Return what stands behind a verdict, in a few words."""
    if result.verdict == "not supported":
        return f"the target lacks: {result.reason}"
    text = f"{result.runs} runs, {result.compared} passes, {result.reused} tokens reused"
    text += f", {result.refused} operations refused" if result.refused else ""
    return f"{text}, largest difference {result.largest:.2g}" if result.largest else text
