"""What ``--help`` shows: the options that people need, by what they are about; ``--help-all`` shows all."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import Any

import jsonargparse

# Options by what they are about: those that --help shows, and the others. The solver's parts are groups of their own.
SECTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "what is trained": (
        ("problem", "data_dir", "train_samples"),
        ("problem_args", "network", "network_args", "loss", "replay", "resample", "resample_by"),
    ),
    "how long": (
        ("epochs", "max_seconds", "stop_on", "target_loss"),
        (
            *("max_iterations", "max_cpu_seconds", "patience", "keep_best"),
            *("gradient_tolerance", "relative_gradient_tolerance"),
        ),
    ),
    "how": (
        ("batch_size", "seed", "dtype", "device", "optimizer", "learning_rate"),
        ("method", "noise", "average", "micro_batch_size", "autocast", "transport"),
    ),
    "on ranks": (("layout", "subdomains"), ("replicas", "stall_timeout", "drift_check_every")),
    "what is kept": (
        ("run_dir", "overwrite", "resume", "checkpoint_every", "walltime"),
        ("checkpoint_keep_last", "checkpoint_keep_every", "checkpoint_in_background"),
    ),
    "what is shown": (
        ("monitor", "progress", "view", "log_view"),
        ("trace", "torch_profiler", "tensorboard", "logger"),
    ),
}

USAGE = "%(prog)s [--OPTION VALUE]...\n       mpirun -n 4 python -m %(prog)s [--OPTION VALUE]..."

AFTER_COMMON = "--help-all shows all options, also those of the solver's parts, and the arguments of each problem."


class CommonHelp(jsonargparse.DefaultHelpFormatter):
    """Formats the help with the options that people need, in sections."""

    everything = False

    def add_arguments(self, actions: Iterable[argparse.Action]) -> None:
        """Take in those of a group of the parser, in as many sections as there are for them."""
        left = {action.dest: action for action in actions}
        sections = [(title, [left.pop(name) for name in names if name in left]) for title, names in self._names()]
        for common, others in () if self.everything else SECTIONS.values():
            for name in (*common, *others):
                left.pop(name, None)
        if self.everything or not any("." in name for name in left):
            super().add_arguments(left.values())
        for title, own in sections:
            # The group that argparse has begun, and will end.
            self.end_section()
            self.start_section(title)
            super().add_arguments(own)

    def _names(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        for title, (common, others) in SECTIONS.items():
            yield title, (*common, *others) if self.everything else common


class WholeHelp(CommonHelp):
    """Formats the help with all options."""

    everything = True


class HelpAll(argparse.Action):
    """Prints all options, and ``const`` after them, and ends the process."""

    def __init__(self, option_strings: list[str], dest: str, const: str, help: str) -> None:
        super().__init__(option_strings, dest, 0, const, argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """As argparse does for ``--help``."""
        parser.formatter_class, parser.epilog = WholeHelp, self.const
        parser.print_help()
        parser.exit()
