"""How fast APTS ends on full batches, in float64: ``python full_batch.py PROBLEM SUBDOMAINS ITERATIONS``."""

import itertools
import sys
import time

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from apts_mpi import APTS, APTSOptions


class Valley(nn.Module):
    """Rosenbrock's function as a sum of squares of two outputs that know no inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.tensor([-1.2, 1.0]))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        first, second = self.point
        return torch.stack([10.0 * (second - first**2), 1.0 - first]).expand(len(inputs), 2)


def tanh_network(*widths: int) -> nn.Sequential:
    """Layers with tanh between them."""
    layers = [part for pair in itertools.pairwise(widths) for part in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def make(name: str):
    """Network, loss, and batch."""
    torch.manual_seed(0)
    points = torch.rand(200, 2) * 2.0 - 1.0
    waves = torch.sin(3.0 * points[:, :1]) * torch.cos(2.0 * points[:, 1:])
    features = torch.randn(500, 20)
    if name == "rosenbrock":
        return Valley(), mse_loss, (torch.zeros(8, 1), torch.zeros(8, 2))
    if name == "logistic":
        labels = (features @ torch.randn(20, 3) + torch.randn(500, 3)).argmax(1)
        return nn.Sequential(nn.Linear(20, 3)), cross_entropy, (features, labels)
    if name == "classification":
        labels = ((features**2 - 1.0 + features) @ torch.randn(20, 4)).argmax(1)
        return tanh_network(20, 24, 24, 24, 4), cross_entropy, (features, labels)
    if name == "deep":
        return tanh_network(2, *[10] * 31, 1), mse_loss, (points, waves)
    return tanh_network(2, 20, 20, 20, 1), mse_loss, (points, waves)


def first(values: list[float], bound: float) -> str:
    """The first iteration at which values are at most a bound."""
    return str(next((number for number, value in enumerate(values) if value <= bound), "-"))


def main() -> None:
    """Train until nothing falls any more, or to the last iteration, and print one line."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    name, subdomains, iterations = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    network, loss, batch = make(name)
    solver = APTS(network, loss, options=APTSOptions(subdomains=subdomains))
    started = time.process_time()
    results = [solver.step(batch)]
    while len(results) < iterations and not results[-1].at_rest:
        results.append(solver.step())
    losses, norms = ([getattr(result.schwarz, what) for result in results] for what in ("loss", "gradient_norm"))
    print(
        f"{name} {subdomains}: {len(results)} iterations, loss {min(losses):.1e} (1e-6 at {first(losses, 1e-6)}, "
        f"1e-24 at {first(losses, 1e-24)}), gradient {min(norms):.0e} (1e-10 at {first(norms, 1e-10)}), "
        f"{sum(result.gradient_evaluations for result in results):.0f} evaluations, "
        f"{time.process_time() - started:.1f} s, at rest: {results[-1].at_rest}"
    )


if __name__ == "__main__":
    main()
