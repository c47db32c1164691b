"""Networks that do unusual things, for the program `networks_tried.py`; the last four are refused."""

import numpy
import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint
from tried_known import LENGTH, SAMPLES, WORDS, Called, Trial, counting, digits, next_word, tried


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


class Root(nn.Module):
    def forward(self, inputs):
        return torch.relu(inputs).sqrt()


@tried("square roots at 0")
def root():
    return layers(lambda layer: layer, Root)


class NoiseOfNumpy(nn.Module):
    def forward(self, inputs):
        return inputs + 0.1 * torch.from_numpy(numpy.random.randn(*inputs.shape)).float()  # noqa: NPY002


tried("noise of numpy's in the network")(lambda: layers(lambda layer: layer, NoiseOfNumpy))


@tried("a loss that is a sum")
def summed():
    return Trial(nn.Linear(64, 10), nn.CrossEntropyLoss(reduction="sum"), *digits(64))


@tried("a contrastive loss")
def contrastive():
    def loss(outputs, labels):
        near = functional.normalize(outputs) @ functional.normalize(outputs).T - 9.0 * torch.eye(len(outputs))
        alike = (labels[:, None] == labels).float() * (1.0 - torch.eye(len(labels)))
        return -(alike * near.log_softmax(dim=1)).sum() / alike.sum()

    return Trial(nn.Linear(64, 10), loss, *digits(64))


@tried("outputs (N, 1), targets (N,)")
def broadcast():
    images, _ = digits(64)
    return Trial(nn.Linear(64, 1), mse_loss, images, images.mean(dim=1))
