"""Small networks of many kinds, trained by APTS with its defaults and by Adam: a row of a table for each.

python networks_tried.py
python networks_tried.py --only GPT-2
"""

import argparse
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import apts_mpi
from apts_mpi.problems import build

SAMPLES, BATCH, EPOCHS, WORDS, LENGTH = 256, 64, 8, 16, 12


class Trial(NamedTuple):
    """A network, a loss, and samples for it."""

    network: nn.Module
    loss: Callable[[Any, Any], torch.Tensor]
    inputs: Any
    targets: Any


TRIALS: dict[str, Callable[[], Trial]] = {}


def tried(name):
    def add(function):
        TRIALS[name] = function
        return function

    return add


def digits(*shape):
    inputs, targets = build("digits").train
    return inputs[:SAMPLES].reshape(-1, *shape).clone(), targets[:SAMPLES].clone()


def counting():
    """Lines of words that go on in steps of 1 to 4, and these steps as classes."""
    first, step = torch.randint(WORDS, (SAMPLES, 1)), torch.randint(4, (SAMPLES, 1))
    return (first + (step + 1) * torch.arange(LENGTH)) % WORDS, step[:, 0]


def next_word(scores, words):
    return cross_entropy(scores[:, :-1].transpose(1, 2), words[:, 1:])


class Called(nn.Module):
    """Modules with a forward of one's own, as a function of these and of the inputs."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.function, self.parts = forward, nn.ModuleDict(modules)

    def forward(self, inputs):
        return self.function(self.parts, inputs)


@tried("GPT-2")
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=WORDS, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2, use_cache=False)
    words, _ = counting()
    return Trial(GPT2LMHeadModel(config), lambda found, words: next_word(found.logits, words), words, words)


@tried("BERT")
def bert():
    from transformers import BertConfig, BertForSequenceClassification

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=WORDS, num_labels=4, initializer_range=0.15, **size)
    words, steps = counting()
    inputs = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    return Trial(BertForSequenceClassification(config), lambda found, y: cross_entropy(found.logits, y), inputs, steps)


@tried("ViT")
def vit():
    from transformers import ViTConfig, ViTForImageClassification

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, initializer_range=0.15, **size)
    images, labels = digits(1, 8, 8)
    inputs = {"pixel_values": images}
    return Trial(ViTForImageClassification(config), lambda found, y: cross_entropy(found.logits, y), inputs, labels)


@tried("LLaMA")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = LlamaConfig(vocab_size=WORDS, num_key_value_heads=1, use_cache=False, initializer_range=0.15, **size)
    words, _ = counting()
    return Trial(LlamaForCausalLM(config), lambda found, words: next_word(found.logits, words), words, words)


class Residual(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.outer = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, inputs):
        return functional.relu(self.inner(inputs) + self.outer(inputs), inplace=True)


@tried("ResNet with batch norm")
def resnet():
    blocks = Residual(1, 8, 1), Residual(8, 16, 2), Residual(16, 16, 1)
    return Trial(
        nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
        cross_entropy,
        *digits(1, 8, 8),
    )


@tried("U-Net")
def unet():
    def forward(parts, images):
        fine = torch.relu(parts["fine"](images))
        coarse = torch.relu(parts["coarse"](functional.max_pool2d(fine, 2)))
        return parts["end"](torch.cat([fine, parts["up"](coarse)], dim=1))

    parts = {"fine": nn.Conv2d(1, 8, 3, padding=1), "coarse": nn.Conv2d(8, 16, 3, padding=1)}
    network = Called(forward, **parts, up=nn.ConvTranspose2d(16, 8, 2, 2), end=nn.Conv2d(16, 1, 1))
    images, _ = digits(1, 8, 8)
    return Trial(network, mse_loss, images + 0.5 * torch.randn_like(images), images)


def recurrent(cell):
    network = Called(
        lambda parts, images: parts["end"](parts["cell"](images)[0][:, -1]), cell=cell, end=nn.Linear(32, 10)
    )
    return Trial(network, cross_entropy, *digits(8, 8))


tried("LSTM")(lambda: recurrent(nn.LSTM(8, 32, batch_first=True)))
tried("GRU")(lambda: recurrent(nn.GRU(8, 32, batch_first=True)))


@tried("mixture of experts, auxiliary loss")
def experts():
    def forward(parts, images):
        shares = parts["gate"](images).softmax(dim=1)
        best = shares.topk(2, dim=1)
        kept = torch.zeros_like(shares).scatter(1, best.indices, best.values)
        outputs = torch.stack([expert(images) for expert in parts["experts"]], dim=1)
        return (kept[:, :, None] * outputs).sum(dim=1), 4.0 * shares.mean(dim=0).square().sum()

    parts = nn.ModuleList(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)) for _ in range(4))
    network = Called(forward, gate=nn.Linear(64, 4), experts=parts)
    return Trial(network, lambda found, y: cross_entropy(found[0], y) + 0.01 * found[1], *digits(64))


@tried("graph convolutions")
def graph():
    neighbours = torch.rand(SAMPLES, 10, 10) < 0.3
    neighbours = (neighbours | neighbours.transpose(1, 2)).float() + torch.eye(10)
    nodes = torch.randn(SAMPLES, 10, 4)

    def forward(parts, inputs):
        nodes, links = inputs
        links = links / links.sum(dim=2, keepdim=True)
        for layer in parts["layers"]:
            nodes = torch.relu(layer(links @ nodes))
        return parts["end"](nodes.mean(dim=1))

    network = Called(forward, layers=nn.ModuleList([nn.Linear(4, 32), nn.Linear(32, 32)]), end=nn.Linear(32, 2))
    spread = (neighbours @ nodes).abs().mean(dim=(1, 2))
    return Trial(network, cross_entropy, (nodes, neighbours), (spread > spread.median()).long())


class LowRank(nn.Module):
    def __init__(self, linear, rank):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down, self.up = (
            nn.Linear(linear.in_features, rank, bias=False),
            nn.Linear(rank, linear.out_features, bias=False),
        )
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs):
        return self.linear(inputs) + self.up(self.down(inputs))


@tried("LoRA, frozen backbone")
def lora():
    layers = LowRank(nn.Linear(64, 64), 4), nn.ReLU(), LowRank(nn.Linear(64, 64), 4), nn.ReLU(), nn.Linear(64, 10)
    return Trial(nn.Sequential(*layers), cross_entropy, *digits(64))


@tried("neural ODE in fixed steps")
def ode():
    def forward(parts, inputs):
        state = parts["start"](inputs)
        for _ in range(8):
            middle = state + 0.0625 * parts["slope"](state)
            state = state + 0.125 * parts["slope"](middle)
        return parts["end"](state)

    slope = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    return Trial(
        Called(forward, start=nn.Linear(64, 32), slope=slope, end=nn.Linear(32, 10)), cross_entropy, *digits(64)
    )


class Modes(nn.Module):
    """The lowest frequencies, multiplied by complex weights."""

    def __init__(self, width, modes):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(width, width, modes, dtype=torch.complex64) / width)

    def forward(self, inputs):
        waves = torch.fft.rfft(inputs)
        modes = torch.einsum("bim,iom->bom", waves[..., : self.weights.shape[2]], self.weights)
        return torch.fft.irfft(functional.pad(modes, (0, waves.shape[2] - modes.shape[2])), n=inputs.shape[2])


def waves():
    """Sums of three sines on 32 points, and their running sums."""
    points, amplitudes = torch.linspace(0.0, 6.28, 32), torch.randn(SAMPLES, 3)
    inputs = (amplitudes[:, :, None] * torch.sin(torch.arange(1, 4)[:, None] * points)).sum(dim=1)
    return inputs, inputs.cumsum(dim=1) * 0.2


@tried("Fourier neural operator, complex weights")
def operator():
    def forward(parts, inputs):
        values = parts["start"](inputs[:, None])
        values = functional.gelu(parts["modes"](values) + parts["local"](values))
        return parts["end"](values)[:, 0]

    layers = {"start": nn.Conv1d(1, 8, 1), "modes": Modes(8, 6), "local": nn.Conv1d(8, 8, 1), "end": nn.Conv1d(8, 1, 1)}
    return Trial(Called(forward, **layers), mse_loss, *waves())


class DeepONet(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16))
        self.trunk = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 16))

    def forward(self, function, point):
        return (self.branch(function) * self.trunk(point)).sum(dim=1)


@tried("DeepONet, inputs in a dict")
def deeponet():
    functions, sums = waves()
    place = torch.randint(32, (SAMPLES,))
    return Trial(
        DeepONet(), mse_loss, {"function": functions, "point": place[:, None] / 32}, sums[torch.arange(SAMPLES), place]
    )


@tried("EmbeddingBag")
def bags():
    words = torch.randint(50, (SAMPLES, 6))
    return Trial(
        nn.Sequential(nn.EmbeddingBag(50, 16), nn.Linear(16, 2)), cross_entropy, words, (words.sum(dim=1) > 147).long()
    )


@tried("CTC loss")
def ctc():
    said = torch.randint(1, 6, (SAMPLES, 4))
    inputs = functional.one_hot(said, 6).float().repeat_interleave(4, dim=1) + 0.3 * torch.randn(SAMPLES, 16, 6)

    def loss(scores, said):
        steps, letters = torch.full((len(said),), 16), torch.full((len(said),), 4)
        each = functional.ctc_loss(scores.log_softmax(2).transpose(0, 1), said, steps, letters, reduction="none")
        return each.mean()

    return Trial(nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 6)), loss, inputs, said)


def checkpointed(reentrant):
    def forward(parts, images):
        hidden = torch.relu(parts["start"](images))
        return parts["end"](checkpoint(parts["inner"], hidden, use_reentrant=reentrant))

    inner = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    return Trial(
        Called(forward, start=nn.Linear(64, 64), inner=inner, end=nn.Linear(64, 10)), cross_entropy, *digits(64)
    )


tried("checkpointing, reentrant")(lambda: checkpointed(True))
tried("checkpointing, not reentrant")(lambda: checkpointed(False))


@tried("autoencoder with tied weights")
def autoencoder():
    def forward(parts, images):
        return functional.linear(torch.tanh(parts["code"](images)), parts["code"].weight.T)

    images, _ = digits(64)
    return Trial(Called(forward, code=nn.Linear(64, 16)), mse_loss, images, images)


class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 32), nn.Parameter(0.1 * torch.randn(LENGTH, 32))
        self.transformer = nn.Transformer(32, 2, 1, 1, 64, dropout=0.1, batch_first=True)
        self.end = nn.Linear(32, WORDS)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, words):
        hidden, masks = (
            self.words(words) + self.places,
            dict.fromkeys(("src_mask", "tgt_mask", "memory_mask"), self.mask),
        )
        return self.end(self.transformer(hidden, hidden, **masks))


@tried("nn.Transformer, mask of −inf in a buffer")
def transformer():
    words, _ = counting()
    return Trial(Causal(), next_word, words, words)


@tried("two tasks, outputs in a tuple")
def tasks():
    def forward(parts, images):
        hidden = torch.relu(parts["start"](images))
        return parts["classes"](hidden), parts["value"](hidden)[:, 0]

    def loss(outputs, targets):
        return cross_entropy(outputs[0], targets[0]) + mse_loss(outputs[1], targets[1])

    images, labels = digits(64)
    network = Called(forward, start=nn.Linear(64, 32), classes=nn.Linear(32, 10), value=nn.Linear(32, 1))
    return Trial(network, loss, images, (labels, images.mean(dim=1)))


def layers(wrap, between=nn.ReLU):
    network = nn.Sequential(wrap(nn.Linear(64, 64)), between(), wrap(nn.Linear(64, 64)), between(), nn.Linear(64, 10))
    return Trial(network, cross_entropy, *digits(64))


class Tangent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs):
        ctx.save_for_backward(inputs.tanh())
        return inputs.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * (1.0 - ctx.saved_tensors[0] ** 2)


class Opaque(nn.Module):
    def forward(self, inputs):
        return Tangent.apply(inputs)


class Power(nn.Module):
    def forward(self, inputs):
        return torch.relu(inputs) ** 1.5


tried("spectral_norm")(lambda: layers(nn.utils.parametrizations.spectral_norm))
tried("weight_norm")(lambda: layers(nn.utils.parametrizations.weight_norm))
tried("a Function that is once_differentiable")(lambda: layers(lambda layer: layer, Opaque))
tried("dropout after every layer")(lambda: layers(lambda layer: nn.Sequential(layer, nn.Dropout(0.2))))


@tried("a power of 1.5 at 0")
def power():
    return layers(lambda layer: layer, Power)


def called(network, inputs):
    return network(**inputs) if isinstance(inputs, dict) else network(inputs)


def batches(trial):
    """Rows of the batches of all epochs, and the tensors of each: the same for every method."""
    torch.manual_seed(1)
    order = [rows for _ in range(EPOCHS) for rows in torch.randperm(SAMPLES).split(BATCH)]
    for rows in order:
        yield tree_map(lambda tensor, rows=rows: tensor[rows], (trial.inputs, trial.targets))


@torch.no_grad()
def loss_at_end(trial):
    return trial.loss(called(trial.network.eval(), trial.inputs), trial.targets).item()


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
    print("| network | | APTS | Adam |\n|---|---|---|---|")
    for name in TRIALS if only is None else [only]:
        print(row(name), flush=True)
