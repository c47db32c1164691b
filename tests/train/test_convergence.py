"""Runs that come to the bottom, or meet batches that are solved or no numbers: they end, or go on unharmed."""

import json

import pytest
import torch
from networks import classified, classifier, cross_entropy
from run_files import arrays, history
from torch import nn

OPTIONS = ["--dtype=float64", "--device=cpu", "--run-dir=run", "--problem=test_convergence:zero"]


def zero():
    """The loss is exactly 0 from the first step on."""
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    with torch.no_grad():
        for parameter in network[2].parameters():
            parameter.zero_()
    generator = torch.Generator().manual_seed(0)
    return network, nn.functional.mse_loss, (torch.randn(40, 3, generator=generator), torch.zeros(40, 1))


def line():
    """Least squares that an exact step solves: to the last digit after some steps."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 3, generator=generator)
    return nn.Linear(3, 1), nn.functional.mse_loss, (inputs, inputs @ torch.tensor([[1.0], [2.0], [3.0]]))


class Cube(nn.Module):
    """Infinite for large inputs."""

    def forward(self, inputs):
        return inputs**3


def one_sample_too_large():
    """The loss of each batch with one sample is no number; it comes last in the first epoch."""
    torch.manual_seed(0)
    inputs, targets = classified(120)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(1))
    inputs[order[-1], 0] = 1e200
    return nn.Sequential(Cube(), *classifier()), cross_entropy, (inputs, targets)


def summary(directory):
    return json.loads((directory / "run" / "summary.json").read_text())


@pytest.mark.mpi
@pytest.mark.all_sizes
@pytest.mark.parametrize("solver", ["auto", "gauss-newton", "adam"])
@pytest.mark.parametrize("batch", ["40", "10"])
def test_solved_problem_ends_as_converged(world, directory, trained, solver, batch):
    """Of each batch one step, all skipped; the same again after it is resumed."""
    options = [*OPTIONS, f"--local.solver={solver}", f"--batch-size={batch}", "--epochs=1000", "--subdomains=2"]
    if world.size > 4 and batch == "10":
        options.append("--schwarz.local_data=full")
    output = trained(*options)
    again = trained(*options, "--resume")
    if world.rank == 0:
        batches = 40 // int(batch)
        assert output.count(f"converged after iteration {batches}: no batch has anything left to gain") == 1
        assert "converged after" in again
        found = summary(directory)
        assert found["skipped_steps"] == found["iterations"] == batches and found["rejected_steps"] == 0


@pytest.mark.mpi
def test_least_squares_to_the_last_digit(world, directory, trained):
    """Steps that change no parameter any more are not accepted, and end the run."""
    output = trained(*OPTIONS[:-1], "--problem=test_convergence:line", "--epochs=3000", "--local.solver=gauss-newton",
                     "--coarse=none", "--subdomains=1")  # fmt: skip
    if world.rank == 0:
        assert "converged after" in output
        assert history(directory / "run")[-1]["train_loss"] < 1e-28


def test_batches_that_are_no_numbers_do_no_harm(directory, trained):
    """One of six each epoch."""
    trained(*OPTIONS[:-1], "--problem=test_convergence:one_sample_too_large", "--epochs=20", "--batch-size=20",
            "--subdomains=3")  # fmt: skip
    found = summary(directory)
    assert found["skipped_steps"] == 20
    records = [record for record in history(directory / "run") if "rho" in record]
    assert all(record["next_radius"] == record["radius"] for record in records if record["skipped"])
    losses = [record["loss"] for record in records if not record["skipped"]]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_run_that_converged_is_the_one_that_was_resumed(directory, trained):
    """The number of batches at rest is part of the run."""
    options = [*OPTIONS, "--batch-size=10", "--epochs=1000", "--subdomains=2"]
    trained(*options)
    whole = arrays(directory / "run"), history(directory / "run")
    options[2] = "--run-dir=parts"
    trained(*options, "--max-iterations=2")
    trained(*options, "--resume", "--max-iterations=1000")
    assert (arrays(directory / "parts"), history(directory / "parts")) == whole
