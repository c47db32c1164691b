"""Whether the data of a problem are numbers: one nan has every loss of its sample, and every mean with it, be nan."""

import torch

from apts_mpi.errors import InvalidInput
from apts_mpi.problems.problem import Problem, Wanted
from apts_mpi.tools.tensors import first_not_finite


def check_finite(problem: Problem, wanted: Wanted) -> None:
    """Look at all samples that are there; others stand for what another process reads.

    Raises
    ------
    InvalidInput
        For nan or inf, naming the first sample that has some.
    """
    data = {"training": problem.train} | ({} if problem.test is None else {"test": problem.test})
    for which, samples in data.items():
        for what, tensor, is_there in zip(("inputs", "targets"), samples, (wanted.inputs, wanted.targets), strict=True):
            # Of what is read as it is needed each part is looked at then.
            place = first_not_finite(tensor) if is_there and isinstance(tensor, torch.Tensor) else None
            if place is not None:
                sample, *within = place
                where = f"has {float(tensor[place])} at {within}" if within else f"is {float(tensor[place])}"
                raise InvalidInput(
                    f"problem {problem.name}: sample {sample} of the {which} {what} {where}; remove or mend it"
                )
