"""Networks of well-known kinds, for the program `networks_tried.py`: each with a loss and samples."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import cross_entropy, mse_loss

from apts_mpi.problems import build

SAMPLES, WORDS, LENGTH = 256, 16, 12


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
