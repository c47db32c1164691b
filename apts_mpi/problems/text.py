"""Language modelling: a small GPT predicts the next character of a text file."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from apts_mpi.errors import InvalidInput, require
from apts_mpi.problems.losses import token_cross_entropy
from apts_mpi.problems.problem import Problem

CONTEXT = 64

# GPT-2's standard deviation of initial weights (Radford et al. 2019).
_INITIAL_DEVIATION = 0.02


def text(
    data_dir: str | None,
    dtype: torch.dtype,
    *,
    width: int = 128,
    heads: int = 4,
    blocks: int = 4,
    context: int = CONTEXT,
) -> Problem:
    """Next-character prediction with 4 transformer blocks of width 128 (0.8 million parameters).

    Samples are windows of ``context`` + 1 characters that do not overlap; those in the last tenth of the text are the
    test set.

    Parameters
    ----------
    data_dir : str
        A text file in UTF-8, or a directory that holds exactly one ``.txt`` file.
    dtype : torch.dtype
    width, heads, blocks, context : int
        See `character_gpt`.

    Raises
    ------
    InvalidInput
        When there is no such file, it cannot be read or it is too short; when the heads do not divide the width.
    """
    require(width % heads == 0, "--problem.args.heads", heads, f"give a divisor of the width, {width}")
    tokens, vocabulary = _read_tokens(_text_file(data_dir), context)
    held_out = len(tokens) // 10
    network = character_gpt(vocabulary, context, width, heads, blocks)
    return Problem(
        name="text",
        network=network.to(dtype),
        loss=token_cross_entropy,
        train=_windows(tokens[: len(tokens) - held_out], context),
        test=_windows(tokens[len(tokens) - held_out :], context),
        batch_size=64,
        epochs=2,
        accuracy=True,
    )


def character_gpt(vocabulary: int, context: int, width: int, heads: int, blocks: int) -> nn.Sequential:
    """A decoder-only transformer with layer normalisation before each part; (b, t) int64 to (b, t, vocabulary).

    Parameters
    ----------
    vocabulary : int
        Number of different characters.
    context : int
        Largest t.
    width, heads, blocks : int
        Features of a token, attention heads, transformer blocks.
    """
    network = nn.Sequential(
        Embedding(vocabulary, context, width),
        *[TransformerBlock(width, heads) for _ in range(blocks)],
        nn.LayerNorm(width),
        nn.Linear(width, vocabulary),
    )
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=_INITIAL_DEVIATION)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return network


class Embedding(nn.Module):
    """Sum of a learned vector for each character and one for its position; (b, t) to (b, t, width)."""

    def __init__(self, vocabulary: int, context: int, width: int) -> None:
        super().__init__()
        self.character = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.character(tokens) + self.position.weight[: tokens.shape[1]]


class TransformerBlock(nn.Module):
    """Causal self-attention and a two-layer network, each added to its input; (b, t, width) to the same.

    Parameters
    ----------
    width : int
    heads : int
        A divisor of the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self._attention(self.norm1(tokens))
        hidden = torch.nn.functional.gelu(self.expand(self.norm2(tokens)))
        return tokens + self.contract(hidden)

    def _attention(self, tokens: Tensor) -> Tensor:
        query, key, value = (self._split(layer(tokens)) for layer in (self.query, self.key, self.value))
        # Not scaled_dot_product_attention: its kernels have no forward-mode derivative.
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(dim=-1) @ value
        return self.projection(mixed.transpose(1, 2).flatten(2))

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _text_file(data_dir: str | None) -> Path:
    if data_dir is None:
        raise InvalidInput("--data-dir: text needs one; give a text file, or a directory with exactly one .txt file")
    path = Path(data_dir)
    if path.is_file():
        return path
    if not path.is_dir():
        raise InvalidInput(
            f"--data-dir: {data_dir!r} does not exist; give a text file, or a directory with exactly one .txt file"
        )
    found = sorted(path.glob("*.txt"))
    if len(found) != 1:
        raise InvalidInput(f"--data-dir: {data_dir!r} holds {len(found)} .txt files; give the file itself")
    return found[0]


def _read_tokens(path: Path, context: int) -> tuple[Tensor, int]:
    try:
        characters = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(
            f"--data-dir: {path} cannot be read as text in UTF-8 ({error}); give another file"
        ) from error
    if len(characters) // 10 <= context:
        raise InvalidInput(
            f"--data-dir: {path} has {len(characters)} characters; give a text of at least "
            f"{10 * (context + 1)}, so that its last tenth makes a test sample"
        )
    vocabulary = {character: index for index, character in enumerate(sorted(set(characters)))}
    return torch.tensor([vocabulary[character] for character in characters]), len(vocabulary)


def _windows(tokens: Tensor, context: int) -> tuple[Tensor, Tensor]:
    count = len(tokens) // (context + 1)
    windows = tokens[: count * (context + 1)].view(count, context + 1)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
