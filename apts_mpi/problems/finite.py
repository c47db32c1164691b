"""Whether the data of a problem are numbers: one nan has every loss of its sample, and every mean with it, be nan."""

import torch

from apts_mpi.errors import InvalidInput
from apts_mpi.problems.problem import Problem, Wanted
from apts_mpi.tools.tensors import first_not_finite
from apts_mpi.tools.trees import named_leaves


def check_finite(problem: Problem, wanted: Wanted) -> None:
    """Look at all samples that are there; others stand for what another process reads.

    Raises
    ------
    InvalidInput
        For nan or inf, naming the first sample that has some.
    """
    data = {"training": problem.train} | ({} if problem.test is None else {"test": problem.test})
    for which, samples in data.items():
        inputs, targets = samples
        trees = {"inputs": inputs} if wanted.inputs else {}
        trees |= {"targets": targets} if wanted.targets else {}
        for what, tensor in (pair for name, tree in trees.items() for pair in named_leaves(tree, name).items()):
            # Of what is read as it is needed each part is looked at then.
            place = first_not_finite(tensor) if isinstance(tensor, torch.Tensor) else None
            if place is not None:
                sample, *within = place
                where = f"has {float(tensor[place])} at {within}" if within else f"is {float(tensor[place])}"
                raise InvalidInput(
                    f"problem {problem.name}: sample {sample} of the {which} {what} {where}; remove or mend it"
                )
