"""Merge the reports of a test run at several numbers of ranks, and fail if a test failed or never ran.

Usage: python jobs/check_every_test_ran.py RESULTS

RESULTS has a directory for each run (`plain`, `ranks_1`, `ranks_2`, ...) with the JUnit report of each rank
(`rank_0.xml`, ...) and the exit status of the run (`status`). A test that needs more ranks than a run has is
skipped in that run; skipped in all of them, it would pass unnoticed. The last line printed is
`N passed, N failed`, which counts a test once in each run.
"""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

from pytest import ExitCode

PASSED, SKIPPED, FAILED = "passed", "skipped", "failed"
TIME_LIMIT_STATUSES = (124, 137)  # of the command `timeout`: ended, or killed after it did not end


def read_report(path):
    """Return {test: (outcome, reason of the skip)} of one rank."""
    try:
        cases = ElementTree.parse(path).iter("testcase")
    except ElementTree.ParseError:  # the rank was killed while it wrote; the status of the run tells
        return {}
    outcomes = {}
    for case in cases:
        test = "::".join(filter(None, (case.get("classname"), case.get("name"))))
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcomes[test] = FAILED, ""
        elif test in outcomes:  # the teardown is a case of its own where it fails
            continue
        elif skip is not None and skip.get("type") != "pytest.xfail":
            outcomes[test] = SKIPPED, skip.get("message", "")
        else:
            outcomes[test] = PASSED, ""
    return outcomes


def merge_ranks(reports):
    """Return {test: (outcome, reason)} of one run: a test fails if it fails on any rank."""
    merged = {}
    for report in reports:
        for test, (outcome, reason) in report.items():
            if outcome == FAILED or test not in merged:
                merged[test] = outcome, reason
    return merged


def main():
    runs = sorted(path.parent for path in Path(sys.argv[1]).glob("*/status"))
    counts = {PASSED: 0, SKIPPED: 0, FAILED: 0}
    problems = []
    ran, skips = set(), {}
    for run in runs:
        outcomes = merge_ranks(read_report(path) for path in sorted(run.glob("rank_*.xml")))
        for test, (outcome, reason) in outcomes.items():
            counts[outcome] += 1
            if outcome == SKIPPED:
                skips.setdefault(test, []).append(reason)
            else:
                ran.add(test)
            if outcome == FAILED:
                problems.append(f"failed in {run.name}: {test}")
        status = int((run / "status").read_text())
        failures = any(outcome == FAILED for outcome, _ in outcomes.values())
        accounted_for = status in (ExitCode.OK, ExitCode.NO_TESTS_COLLECTED) or (
            failures and status in (ExitCode.TESTS_FAILED, ExitCode.INTERRUPTED)
        )
        if not accounted_for:
            counts[FAILED] += 1
            end = "at the time limit" if status in TIME_LIMIT_STATUSES else f"with status {status}"
            problems.append(f"failed in {run.name}: the run ended {end}")

    for test, reasons in skips.items():
        if test in ran:
            continue
        if all(re.search(r"\b(ranks?|MPI processes)\b", reason) for reason in reasons):
            problems.append(f"ran at no number of ranks: {test} ({reasons[-1]})")
        else:
            print(f"not run here: {test} ({reasons[-1]})")
    if not ran:
        problems.append("no test ran")
    for problem in problems:
        print(problem)
    print(f"{counts[PASSED]} passed, {counts[FAILED]} failed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
