"""Networks of Hugging Face with random weights, on the mappings that their tokenizers make, beside Adam."""

import os
import subprocess
import sys

import pytest
import torch
from mpi4py import MPI
from networks import cross_entropy
from processes import TESTS, find_mpirun, needs_mpirun
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from apts_mpi import APTS
from apts_mpi.tools.environment import outside_job

EPOCHS = 15
WORDS, LENGTH, SAMPLES = 24, 10, 48


def generator():
    return torch.Generator().manual_seed(1)


def tokens():
    """Arithmetic sequences of two lengths, with their masks."""
    first = torch.randint(WORDS, (SAMPLES, 1), generator=generator())
    ids = (first + torch.arange(LENGTH) * (1 + first % 3)) % WORDS
    mask = torch.ones(SAMPLES, LENGTH, dtype=torch.int64)
    mask[::2, 7:] = 0
    return BatchEncoding({"input_ids": ids, "attention_mask": mask})


def gpt2():
    config = GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    inputs = tokens()
    labels = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)

    def loss(outputs, labels):
        each = cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        counts = (labels[:, 1:] >= 0).to(each.dtype)
        return ((each * counts).sum(1) / counts.sum(1)).mean()

    return GPT2LMHeadModel(config), inputs, labels, loss


def classified(outputs, labels):
    return cross_entropy(outputs.logits, labels)


def bert():
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        initializer_range=0.25,  # 1 / sqrt(hidden_size): with 0.02 a network this narrow is linear
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        num_labels=3,
    )
    inputs = tokens()
    return BertForSequenceClassification(config), inputs, inputs["input_ids"][:, 0] % 3, classified


def vit():
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        initializer_range=0.25,  # 1 / sqrt(hidden_size): with 0.02 a network this narrow is linear
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
    )
    images = torch.randn(SAMPLES, 1, 8, 8, generator=generator())
    return ViTForImageClassification(config), {"pixel_values": images}, images[:, 0, 0, :3].argmax(1), classified


NETWORKS = {"gpt2": gpt2, "bert": bert, "vit": vit}


def made(name):
    torch.manual_seed(0)
    network, inputs, targets, loss = NETWORKS[name]()
    network.eval()  # without dropout, so that losses can be compared
    return network, inputs, targets, loss


def adam(name):
    network, inputs, targets, loss = made(name)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        optimizer.zero_grad()
        loss(network(**inputs), targets).backward()
        optimizer.step()
    return float(loss(network(**inputs), targets).detach())


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_below_adam_after_as_many_epochs(world, name):
    network, inputs, targets, loss = made(name)
    solver = APTS(network, loss, comm=world)
    for _ in range(EPOCHS):
        result = solver.step((inputs, targets))
    assert solver.options.local.solver == "kfac" and solver.options.coarse.model == "gauss-newton"
    assert result.schwarz.loss < adam(name)


def test_the_loss_that_the_network_returns():
    network, inputs, targets, _ = made("bert")
    solver = APTS(network, lambda outputs, targets: outputs.loss, comm=MPI.COMM_SELF)
    losses = [solver.step((dict(inputs) | {"labels": targets}, targets)).schwarz.loss for _ in range(6)]
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.processes
@needs_mpirun
def test_the_example():
    file = TESTS.parent / "docs" / "examples" / "huggingface_gpt2.py"
    environment = outside_job() | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    command = [find_mpirun(), "-n", "2", sys.executable, str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(losses) == 20 and losses[-1] < 0.5 * losses[0]
