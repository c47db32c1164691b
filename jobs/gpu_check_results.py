"""Put together what the parts of gpu_check.sh have left: python gpu_check_results.py DIRECTORY DEVICE FILE.

FILE gets one JSON object: the device, whether all is well, and for each part its status, its seconds, and what it
measured; of one that failed the last lines that it printed instead. The exit status is 1 if one did.
"""

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

# Of a training run; its seconds are those of the iterations.
SUMMARY = ("iterations", "train_loss", "test_accuracy", "seconds", "seconds_in_communication")

# Part by part where MPI need not be able to do it: then the reason is a result, and no failure.
MAY_LACK = {"direct-2": "Iallreduce on GPUs"}

LAST_LINES = 15


def results_of(directory: Path, device: str) -> dict[str, Any]:
    """The object of all parts in their order in time."""
    places = sorted(directory.glob("*/status"), key=lambda path: path.stat().st_mtime_ns)
    parts = {path.parent.name: part_of(path.parent) for path in places}
    for name, check in MAY_LACK.items():
        if name in parts and parts[name]["status"] != 0 and not works(parts.get("doctor", {}), check):
            parts[name] = {"status": 0, "seconds": parts[name]["seconds"], "left_out": f"no {check}, says the doctor"}
    fine = bool(parts) and all(part["status"] == 0 for part in parts.values())
    return {"device": device, "ok": fine, "seconds": sum(part["seconds"] for part in parts.values()), "parts": parts}


def part_of(place: Path) -> dict[str, Any]:
    """Status, seconds, and what was measured or said."""
    status, seconds = map(int, (place / "status").read_text().split())
    found: dict[str, Any] = {"status": status, "seconds": seconds}
    if status != 0:
        said = [line for name in ("output", "errors") for line in lines(place / name)[-LAST_LINES:]]
        found["said"] = said or ["not done: no time was left"]
    return found | measured(place)


def measured(place: Path) -> dict[str, Any]:
    """What a part has left in a file, or printed."""
    figures, tests, summary = place.with_suffix(".json"), place.with_suffix(".xml"), place / "run" / "summary.json"
    if figures.exists():
        return {"found": json.loads(figures.read_text())}
    if tests.exists():
        (suite,) = ET.parse(tests).getroot().iter("testsuite")
        return {"found": {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}}
    if summary.exists():
        values = json.loads(summary.read_text())
        return {"found": {name: values[name] for name in SUMMARY if name in values}}
    if place.name == "doctor":
        # It is JSON whether all is well or not; of a doctor that died it is nothing.
        said = "\n".join(lines(place / "output"))
        return {"found": json.loads(said)} if said.startswith("{") else {}
    return {}


def works(doctor: dict[str, Any], check: str) -> bool:
    """What the doctor says of a check; where it says nothing, it ought to work."""
    rows = doctor.get("found", {}).get("checks", [])
    return all(row["values"].get("works", True) for row in rows if row["check"] == check)


def lines(path: Path) -> list[str]:
    """Those of a file that may not be there."""
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def main() -> None:
    """Write the file, say how it went, and end with a status that says so."""
    directory, device, file = sys.argv[1:]
    found = results_of(Path(directory), device)
    Path(file).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    failed = [name for name, part in found["parts"].items() if part["status"] != 0]
    print(
        f"{file}: {len(found['parts'])} parts in {found['seconds']} s" + "".join(f", {name} failed" for name in failed)
    )
    sys.exit(not found["ok"])


if __name__ == "__main__":
    main()
