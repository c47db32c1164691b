"""Small networks of many kinds, trained by APTS with its defaults and by Adam: a row of a table for each.

python networks_tried.py
python networks_tried.py --only GPT-2
"""

import argparse
import logging
import warnings

import torch
import tried_unusual  # noqa: F401 (for the networks that it adds)
from torch.utils._pytree import tree_map
from tried_known import SAMPLES, TRIALS

import apts_mpi

BATCH, EPOCHS = 64, 8


def called(network, inputs):
    return network(**inputs) if isinstance(inputs, dict) else network(inputs)


def batches(one):
    """Rows of the batches of all epochs, and the tensors of each: the same for every method."""
    torch.manual_seed(1)
    order = [rows for _ in range(EPOCHS) for rows in torch.randperm(SAMPLES).split(BATCH)]
    for rows in order:
        yield tree_map(lambda tensor, rows=rows: tensor[rows], (one.inputs, one.targets))


@torch.no_grad()
def loss_at_end(one):
    return one.loss(called(one.network.eval(), one.inputs), one.targets).item()


def trial(name):
    torch.manual_seed(0)
    return TRIALS[name]()


def by_adam(name, rate):
    """The loss over all samples at the end."""
    one = trial(name)
    optimizer = torch.optim.Adam([p for p in one.network.parameters() if p.requires_grad], lr=rate)
    for inputs, targets in batches(one):
        optimizer.zero_grad()
        one.loss(called(one.network.train(), inputs), targets).backward()
        optimizer.step()
    return loss_at_end(one)


def by_apts(name):
    """The loss over all samples at the end; and what the solver said that it did in the place of something else."""
    one, notes = trial(name), []
    solver = apts_mpi.APTS(one.network.train(), one.loss)
    for batch in batches(one):
        notes += solver.step(batch).notes
    return loss_at_end(one), notes


def row(name):
    """Name, what came of it, loss of APTS and the lower one of two runs of Adam, as a row of a table."""
    adam = min(by_adam(name, rate) for rate in (1e-3, 3e-3))
    try:
        loss, notes = by_apts(name)
    except apts_mpi.InvalidInput as error:
        return f"| {name} | refused: {error} | | {adam:.3g} |"
    found = "; ".join(["falls back", *notes]).replace(";", ":", 1) if notes else "works"
    return f"| {name} | {found} | {loss:.3g} | {adam:.3g} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=TRIALS, metavar="NAME", help="one of: " + "; ".join(TRIALS))
    only = parser.parse_args().only
    logging.disable(logging.WARNING)  # the notes are in the table
    warnings.simplefilter("ignore")  # as torch says of the shapes that broadcast
    print("| network | | APTS | Adam |\n|---|---|---|---|")
    for name in TRIALS if only is None else [only]:
        print(row(name), flush=True)
