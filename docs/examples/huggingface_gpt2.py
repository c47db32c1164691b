"""A small GPT-2 of Hugging Face on lines of text of unequal lengths: mpirun -n 2 python huggingface_gpt2.py"""

import torch
from mpi4py import MPI
from transformers import GPT2Config, GPT2LMHeadModel

import apts_mpi.losses

LINES = [f"{a} plus {b} is {a + b}." for a in range(8) for b in range(8)]
LETTERS = sorted(set("".join(LINES)))
PADDING = 0

length = max(map(len, LINES))
tokens = torch.full((len(LINES), length), PADDING)
for row, line in zip(tokens, LINES, strict=True):
    row[: len(line)] = torch.tensor([1 + LETTERS.index(letter) for letter in line])
inputs = {"input_ids": tokens, "attention_mask": (tokens != PADDING).long()}


of_tokens = apts_mpi.losses.cross_entropy(ignore_index=PADDING)


def loss(outputs, tokens):
    """Each token tells the next one."""
    return of_tokens(outputs.logits[:, :-1].transpose(1, 2), tokens[:, 1:])


torch.manual_seed(0)
config = GPT2Config(
    vocab_size=1 + len(LETTERS),
    n_positions=length,
    n_embd=32,
    n_layer=2,
    n_head=2,
    bos_token_id=PADDING,
    eos_token_id=PADDING,
    use_cache=False,
)
network = GPT2LMHeadModel(config)
solver = apts_mpi.APTS(network, loss, comm=MPI.COMM_WORLD)
for epoch in range(20):
    result = solver.step((inputs, tokens))
    if MPI.COMM_WORLD.rank == 0:
        print(epoch, f"{result.schwarz.loss:.4f}")
