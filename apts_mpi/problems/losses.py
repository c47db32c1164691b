"""Losses that torch does not have; each is a mean over the samples."""

from torch import Tensor
from torch.nn.functional import cross_entropy


def weighted_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over the samples of the sum of ``weight * (output - value)**2``.

    Parameters
    ----------
    outputs : Tensor, (b, k)
    targets : Tensor, (b, 2 k)
        The values that the outputs should take, and their weights.

    Returns
    -------
    Tensor, scalar
    """
    count = targets.shape[1] // 2
    values, weights = targets[:, :count], targets[:, count:]
    return count * (weights * (outputs - values).square()).mean()


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
