"""What all ranks of a run have to be given alike, compared before work starts: the options, and the problem's data."""

from __future__ import annotations

from typing import Any

import torch

from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.sameness import check_same, check_same_trees, fields_in_words
from apts_mpi.problems import Problem, Wanted
from apts_mpi.tools.trees import Tree, Unread, take
from apts_mpi.train.options import TrainingOptions

# Places, of which each host may have its own, and devices.
OF_A_RANK = {"data_dir", "device", "run_dir"}


# Samples that are compared of those that are read as they are needed.
SOME = 16


def check_same_options(options: TrainingOptions, comm: Communicator) -> None:
    """See that all ranks have the same options, but for directories and devices. Collective.

    Raises
    ------
    SharedInvalidInput
        Naming the first rank that has another one.
    """
    shared = fields_in_words(options) | {"resume": [str(options.resume is not None)]}
    own = {name: words for name, words in shared.items() if name not in OF_A_RANK}
    check_same(own, comm, "options", "give all ranks the same arguments")


def check_same_problem(problem: Problem, there: Wanted, comm: Communicator) -> None:
    """See that all ranks have the same samples, batches and metrics. Collective.

    Parameters
    ----------
    problem
        With the data of all ranks, which share them out.
    there
        Which of its data this rank has.
    comm
        All ranks.

    Raises
    ------
    SharedInvalidInput
        Naming the first rank that has others.
    """
    where = f"problem {problem.name}"
    remedy = "all ranks need the same: seed what is random, and let nothing depend on the rank"
    names = ("name", "batch_size", "epochs", "accuracy", "group_size", "coupled")
    shared = {name: [repr(getattr(problem, name))] for name in names}
    given = [name for name in ("test", "forward", "redraw") if getattr(problem, name) is not None]
    shared |= {"set of parts": given, "list of metrics": list(problem.metrics)}
    lazy = {name: data for name, data in (("train", problem.train), ("test", problem.test)) if _is_read(data)}
    shared |= {f"number of {name} samples": [str(len(data[0]))] for name, data in lazy.items()}
    check_same(shared, comm, where, remedy)
    trees: dict[str, Tree] = {}
    with comm.shared_errors():
        for which, samples in (("train", problem.train), ("test", problem.test)):
            if samples is not None:
                inputs, targets = samples
                trees |= {f"{which} inputs": _compared(inputs)} if there.inputs else {}
                trees |= {f"{which} targets": _compared(targets)} if there.targets else {}
    check_same_trees(trees, None, comm, where, remedy)


def _is_read(data: Any) -> bool:
    """Whether samples are read as they are needed."""
    return data is not None and any(isinstance(part, Unread) for part in data)


def _compared(part: Tree) -> Tree:
    """Of what is in memory all is compared, and of what is read as it is needed some samples."""
    if not isinstance(part, Unread):
        return part
    few = min(SOME, len(part))
    return take(part, torch.arange(few) * len(part) // few)
