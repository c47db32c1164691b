"""Networks, batches and options that the tests share. All float64, so that tolerances can be tight."""

import itertools

import torch
from torch import nn

from apts_mpi import (
    APTS,
    APTSOptions,
    CoarseOptions,
    GlobalStepOptions,
    LocalOptions,
    SchwarzOptions,
    TrustRegionOptions,
)

SAMPLES = 121  # not divisible by 2, 3, 4, 6 or 8
FEATURES, CLASSES = 10, 3

cross_entropy = nn.functional.cross_entropy
squared_error = nn.functional.mse_loss


def options(
    *,
    subdomains=6,
    replicas=1,
    batch="whole",
    seed=0,
    decomposition="parameters",
    variant="exact",
    partition="layer",
    overlap=0,
    type="restrict",
    local_data="shard",
    damping=1.0,
    solver="sgd",
    iterations=1,
    initial_radius=0.3,
    min_radius=1e-8,
    max_radius=1e4,
    eta1=1e-4,
    eta2=0.75,
    shrink_below=0.25,
    decrease_factor=0.25,
    increase_factor=2.0,
    norm="2",
    window=0,
    global_step="none",
):
    """Every option by its own name, whatever the defaults of the package; no coarse level."""
    return APTSOptions(
        subdomains=subdomains,
        replicas=replicas,
        batch=batch,
        seed=seed,
        schwarz=SchwarzOptions(
            decomposition=decomposition,
            variant=variant,
            partition=partition,
            overlap=overlap,
            type=type,
            local_data=local_data,
            damping=damping,
        ),
        local=LocalOptions(solver=solver, iterations=iterations),
        coarse=CoarseOptions(model="none"),
        trust_region=TrustRegionOptions(
            initial_radius=initial_radius,
            min_radius=min_radius,
            max_radius=max_radius,
            eta1=eta1,
            eta2=eta2,
            shrink_below=shrink_below,
            decrease_factor=decrease_factor,
            increase_factor=increase_factor,
            norm=norm,
            window=window,
        ),
        global_step=GlobalStepOptions(model=global_step),
    )


def classifier(seed=0, *, batch_norm=False, dropout=0.0, width=16):
    """Six layers with parameters (eleven with batch normalisation) of different sizes."""
    torch.manual_seed(seed)
    modules = []
    for index in range(5):
        modules.append(nn.Linear(width if index else FEATURES, width))
        if batch_norm:
            modules.append(nn.BatchNorm1d(width))
        modules.append(nn.Tanh())
        if dropout:
            modules.append(nn.Dropout(dropout))
    return nn.Sequential(*modules, nn.Linear(width, CLASSES)).double()


def uneven(seed=0):
    """Nine layers of 14 to 248 parameters in nested sequences: other numbers of parts are cut elsewhere."""
    torch.manual_seed(seed)
    widths = [FEATURES, 4, 20, 3, 9, 12, 2, 18, 7, CLASSES]
    layers = [nn.Linear(before, after) for before, after in itertools.pairwise(widths)]
    parts = [nn.Sequential(layer, nn.Tanh()) for layer in layers[:-1]]
    return nn.Sequential(nn.Sequential(*parts[:3]), *parts[3:6], nn.Sequential(*parts[6:]), layers[-1]).double()


def classified(samples=SAMPLES, seed=1):
    """Inputs and class indices."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, FEATURES, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, CLASSES, (samples,), generator=generator)


def make_solver(comm, chosen, network=None, loss=cross_entropy):
    return APTS(classifier() if network is None else network, loss, comm=comm, options=chosen)


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def loss_and_gradient(network, loss, batch):
    """Loss on a batch and its flat gradient, by torch alone; the network's own gradients are left alone."""
    value = loss(network(batch[0]), batch[1])
    gradient = torch.autograd.grad(value, list(network.parameters()))
    return value.item(), flat(gradient)


def numbers(result):
    """What a step found, without the times."""
    judged = [step for step in (result.schwarz, result.global_step) if step is not None]
    return [tuple(vars(step).values()) for step in judged]


def problem(network=classifier):
    """A small problem for the command line, in the dtype that it asks for."""
    dtype = torch.get_default_dtype()
    data = [(inputs.to(dtype), targets) for inputs, targets in (classified(60), classified(30, seed=2))]
    return network().to(dtype), cross_entropy, tuple(data)


def uneven_problem():
    """The same with layers of very unequal sizes."""
    return problem(uneven)


def tied_problem():
    """The same with two layers that share a tensor."""
    return problem(tied)


def tied():
    """Eleven layers, the fifth and the sixth with one weight."""
    first, second = nn.Linear(9, 9).double(), nn.Linear(9, 9).double()
    second.weight = first.weight
    parts = list(uneven())
    return nn.Sequential(*parts[:2], first, nn.Tanh(), second, *parts[2:])


def blocks_problem():
    """The same with modules of several layers."""
    return problem(blocks)


def blocks():
    """The nine layers, of which three and three are one module."""
    layers = [module for module in uneven().modules() if isinstance(module, nn.Linear)]
    return nn.Sequential(Block(*layers[:3]), Block(*layers[3:6]), *layers[6:])


class Block(nn.Module):
    """Three layers in one module."""

    def __init__(self, first, second, third):
        super().__init__()
        self.first, self.second, self.third = first, second, third

    def forward(self, inputs):
        return torch.tanh(self.third(torch.tanh(self.second(torch.tanh(self.first(inputs))))))
