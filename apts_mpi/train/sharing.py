"""What all ranks of a run have to be given alike, compared before work starts: the options, and the problem's data."""

from __future__ import annotations

from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.sameness import check_same, check_same_trees, fields_in_words
from apts_mpi.problems import Problem, Wanted
from apts_mpi.tools.trees import Tree
from apts_mpi.train.options import TrainingOptions

# Places, of which each host may have its own, and devices.
OF_A_RANK = {"data_dir", "device", "run_dir"}


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
    given = [name for name in ("test", "forward") if getattr(problem, name) is not None]
    shared |= {"set of parts": given, "list of metrics": list(problem.metrics)}
    check_same(shared, comm, where, remedy)
    trees: dict[str, Tree] = {}
    for which, samples in (("train", problem.train), ("test", problem.test)):
        if samples is not None:
            inputs, targets = samples
            trees |= {f"{which} inputs": inputs} if there.inputs else {}
            trees |= {f"{which} targets": targets} if there.targets else {}
    check_same_trees(trees, None, comm, where, remedy)
