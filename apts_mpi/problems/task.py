"""A task of a sequence of them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Task:
    """Samples that are trained on after those of earlier tasks.

    Parameters
    ----------
    name : str
        In tables.
    train, test : (Tensor, Tensor)
        Inputs and class indices, to train on and held out. All tasks of a sequence have as many to train on.
    """

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def first(self, count: int) -> "Task":
        """The same with the first ``count`` samples to train on."""
        inputs, targets = self.train
        return Task(self.name, (inputs[:count].clone(), targets[:count].clone()), self.test)
