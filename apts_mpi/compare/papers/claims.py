"""What the papers claim of their methods, each with the numbers of the runs that speak for or against it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from apts_mpi.compare.papers.runs import OPTIMIZERS, Variant

# What a run is good by, the first that the problem has; a loss counts with its sign turned.
GOODNESS = {"test_accuracy": 1.0, "test_loss": -1.0, "train_loss": -1.0}


def measure_of(rows: Sequence[Variant]) -> str:
    """What the rows are compared by."""
    return next((name for name in GOODNESS if any(not math.isnan(row.end(name)) for row in rows)), "train_loss")


def best_of(rows: Sequence[Variant], measure: str, names: Sequence[str]) -> Variant | None:
    """The best of the rows of these names; None where none came to its end."""
    ended = [row for row in rows if row.name in names and not math.isnan(row.end(measure))]
    return max(ended, key=lambda row: GOODNESS[measure] * row.end(measure), default=None)


def claims(rows: Sequence[Variant]) -> list[str]:
    """A line for each claim of which the runs say something: what is claimed, whether it held, and the numbers."""
    measure = measure_of(rows)
    return [*_beside_optimizers(rows, measure), *_with_subdomains(rows, measure), *_non_monotone(rows)]


def _beside_optimizers(rows: Sequence[Variant], measure: str) -> Iterator[str]:
    """2312.13677, 2502.05133, 2512.14286: untuned as good as tuned SGD and Adam."""
    methods = dict.fromkeys(row.name for row in rows if row.name not in OPTIMIZERS)
    for optimizer in OPTIMIZERS:
        tuned = best_of(rows, measure, [optimizer])
        for name in methods if tuned else ():
            own = best_of(rows, measure, [name])
            if own and tuned:
                held = GOODNESS[measure] * own.end(measure) >= GOODNESS[measure] * tuned.end(measure)
                yield _line(
                    f"{name} as good as tuned {optimizer}",
                    held,
                    f"{measure} {own.end(measure):.4g} with {own.choice:g} subdomains, {tuned.end(measure):.4g} at "
                    f"{tuned.choice:g}",
                )


def _with_subdomains(rows: Sequence[Variant], measure: str) -> Iterator[str]:
    """2512.14286: more subdomains, better, and less work for each."""
    for name in dict.fromkeys(row.name for row in rows if row.name not in OPTIMIZERS):
        own = [row for row in rows if row.name == name and not math.isnan(row.end(measure))]
        own.sort(key=lambda row: row.choice)
        if len(own) < 2:
            continue
        goodness = [GOODNESS[measure] * row.end(measure) for row in own]
        work = [row.end("cpu_seconds") / row.choice for row in own]
        numbers = ", ".join(f"{row.choice:g}: {row.end(measure):.4g}" for row in own)
        yield _line(f"{name} better with more subdomains", goodness == sorted(goodness), f"{measure} {numbers}")
        numbers = ", ".join(f"{row.choice:g}: {each:.3g} s" for row, each in zip(own, work, strict=True))
        yield _line(f"{name} with less work a subdomain", work == sorted(work, reverse=True), numbers)


def _non_monotone(rows: Sequence[Variant]) -> Iterator[str]:
    """2605.14860: NAPTS has about a third of the rejections of APTS, and takes 30 % less time."""
    for number in dict.fromkeys(row.choice for row in rows if row.name == "napts"):
        found = {row.name: row for row in rows if row.choice == number and row.name in ("apts", "napts")}
        if len(found) < 2 or any(math.isnan(row.end("seconds")) for row in found.values()):
            continue
        rejected = {name: row.end("rejected_steps") for name, row in found.items()}
        seconds = {name: row.end("cpu_seconds") for name, row in found.items()}
        yield _line(
            f"napts with a third of the rejections of apts, {number:g} subdomains",
            rejected["napts"] <= 0.4 * rejected["apts"],
            f"{rejected['napts']:g} of napts, {rejected['apts']:g} of apts",
        )
        yield _line(
            f"napts with 30 % less time than apts, {number:g} subdomains",
            seconds["napts"] <= 0.7 * seconds["apts"],
            f"{seconds['napts']:.3g} and {seconds['apts']:.3g} CPU seconds",
        )


def _line(claim: str, held: bool, numbers: str) -> str:
    return f"{claim}: {'yes' if held else 'no'} ({numbers})"
