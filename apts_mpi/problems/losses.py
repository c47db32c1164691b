"""Losses that torch does not have; each is a mean over the samples."""

from torch import Tensor
from torch.nn.functional import cross_entropy


def weighted_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over the samples of ``weight * (output - value)**2``.

    Parameters
    ----------
    outputs : Tensor, (b, 1)
    targets : Tensor, (b, 2)
        The value that the output should take, and the weight of the sample.

    Returns
    -------
    Tensor, scalar
    """
    value, weight = targets[:, :1], targets[:, 1:]
    return (weight * (outputs - value).square()).mean()


def token_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Softmax cross entropy in nats, averaged over the tokens of all samples.

    Parameters
    ----------
    outputs : Tensor, (b, t, v)
        Scores of the v classes at each of the t positions.
    targets : Tensor, (b, t), int64
        Class indices.

    Returns
    -------
    Tensor, scalar
    """
    return cross_entropy(outputs.flatten(0, 1), targets.flatten())
