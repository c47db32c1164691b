"""A GPT of a billion parameters on many GPUs, on paper: memory, seconds and messages by part, and the first limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from apts_mpi.curvature.kinds import LARGEST_SIDE
from apts_mpi.errors import InvalidInput
from apts_mpi.scaling.calls import Exchanges, Machine
from apts_mpi.scaling.cost_fit import first_limit, predicted
from apts_mpi.scaling.cost_model import BUBBLE, BUCKET, Shape, parts
from apts_mpi.tools.command import say

LAYOUTS = ("staged", "replicated")

GIGA = 1e9

# What moves a limit, by its term.
REMEDIES = {
    "gradient evaluations": "a larger batch: a micro-batch is one sequence, and no rank can have less",
    BUBBLE: "a larger batch, which gives each replica more micro-batches, or fewer stages",
    "local solves": "ranks of a team that share the inverses of their subdomain, or inverses that are kept longer",
    "gradient sum": "a larger batch, or more stages, each of which has fewer parameters to sum",
    "assembly": "layout staged, where no rank needs the whole step",
    "pipeline messages": "activations in 16 bits, or stages of one node beside each other",
    "reduced model": "fewer columns",
    "agreement": "fewer and longer calls: what each costs before MPI has it outweighs its messages",
    "coarse reduction": "fewer columns",
    "Jacobian products": "fewer columns, or fewer targets of the coarse level",
    "fixed": "a larger batch",
}


@dataclass(frozen=True)
class GPT:
    """A decoder: its sizes, and how it is cut."""

    blocks: int = 24
    width: int = 1792
    heads: int = 14
    vocabulary: int = 50257
    tokens: int = 1024
    sequences: int = 4096
    stages: int = 8

    @property
    def parameters(self) -> int:
        """Matrices of 12 width² a block, and one embedding, which is the head as well."""
        return 12 * self.blocks * self.width**2 + self.vocabulary * self.width

    @property
    def sides(self) -> list[int]:
        """Inputs and outputs of the four matrices of a block."""
        width = self.width
        return [width, 3 * width, width, width, width, 4 * width, 4 * width, width]

    @property
    def dense_sides(self) -> list[int]:
        """Those that have a matrix of K-FAC, and not its diagonal alone."""
        return [side for side in self.sides if side <= LARGEST_SIDE]


@dataclass(frozen=True)
class GPU:
    """What a GPU does in a second, which an H100 reaches in long products; and what it has.

    Attributes
    ----------
    flops, float32_flops
        Of products in bfloat16 at 40 % of the peak, and of inverses in float32.
    memory
        Bytes.
    call, kernels
        Seconds of a collective before MPI has it, and of the launches of a pass through a stage.
    """

    flops: float = 396e12
    float32_flops: float = 30e12
    memory: float = 80e9
    call: float = 2e-4
    kernels: float = 1e-3


def shape_of(model: GPT, layout: str, ranks: int) -> Shape:
    """The iteration on so many GPUs: a stage or subdomain for each of a team, which share its samples.

    Raises
    ------
    InvalidInput
        If the ranks are no multiple of the stages, or more than there are sequences for.
    """
    replicas, rest = divmod(ranks, model.stages)
    if rest or not replicas or model.sequences < replicas:
        raise InvalidInput(
            f"ranks: {ranks} GPUs are no {model.stages} stages with 1 to {model.sequences} ranks each; give a multiple "
            f"of {model.stages}"
        )
    size = 4 * model.parameters
    buckets = -(-size // BUCKET)
    # A sum of the gradients bucket by bucket, two numbers of a judged step, and what is said of the batch.
    counted = Exchanges({"global evaluation": (buckets, size / buckets), "judge": (3, 64.0), "data": (4, 64.0)})
    return Shape(
        layout=layout,
        ranks=ranks,
        subdomains=model.stages,
        batch_size=model.sequences,
        parameters=model.parameters,
        targets=model.tokens,
        # Of one sequence each.
        micro_batches=model.sequences // replicas,
        activation_bytes=2.0 * model.tokens * model.width if layout == "staged" else 0.0,
        exchanges=counted if layout == "replicated" else Exchanges(),
    )


def values_of(model: GPT, gpu: GPU) -> dict[str, float]:
    """Values of the unknowns by counting: 6 operations a parameter and token, and what K-FAC and its inverses take."""
    per_token = 6.0 * model.parameters + 12.0 * model.blocks * model.width * model.tokens
    statistics = 2.0 * model.blocks * sum(side**2 for side in model.dense_sides)
    inverses = 2.0 * model.blocks * sum(side**3 for side in model.dense_sides)
    gradient = per_token * model.tokens / gpu.flops
    return {
        "call": gpu.call,
        "gradient": gradient,
        "pass": gpu.kernels,
        "tangent": gradient,
        "statistics": statistics * model.tokens / gpu.flops,
        "factorisation": inverses / gpu.float32_flops,
        "fixed": gpu.kernels,
        # A product of columns at the memory's speed; eigenvalues of small matrices on rank 0's processor.
        "column": 1e-5,
        "pair": 4.0 * model.parameters / model.stages / 3e12,
        "cube": 1e-8,
    }


# Vectors of a rank's parameters: values, gradients, their sum, the last point, the correction, its step in the coarse
# level, the last step, and a copy of the block while it is solved.
VECTORS = ("parameters", "gradients", "their sum", "last point", "correction", "coarse step", "last step", "local copy")


def memory_of(model: GPT, layout: str, shape: Shape) -> dict[str, float]:
    """Bytes of a GPU by part.

    Activations are those of Korthikanti et al. (arXiv 2205.05198) in 16 bits, of all micro-batches whose backward pass
    is still to come: as many as there are stages where the schedule is 1F1B.
    """
    share = model.stages if layout == "staged" else 1
    blocks, width, tokens = model.blocks / share, model.width, model.tokens
    vector = 4.0 * model.parameters / share
    dense = model.blocks / model.stages * sum(side**2 for side in model.dense_sides)
    waiting = min(model.stages, shape.micro_batches) if layout == "staged" else 1
    activations = tokens * width * (34.0 + 5.0 * model.heads * tokens / width)
    return {
        **dict.fromkeys(VECTORS, vector),
        "K-FAC and inverses": 2.0 * 4.0 * dense,
        "activations": waiting * blocks * activations,
        "loss, all words": 4.0 * 2.0 * tokens * model.vocabulary,
    }


def print_paper(model: GPT, gpu: GPU, ranks: Sequence[int], machine: Machine, console: Console) -> None:
    """Print what is assumed, and both layouts at all sizes."""
    say(
        console,
        f"GPT: {model.parameters / GIGA:.3f} B parameters, {model.blocks} blocks of width {model.width}, "
        f"{model.sequences} sequences of {model.tokens} tokens, {model.stages} stages or subdomains",
    )
    say(
        console,
        f"GPU: {gpu.flops / 1e12:.0f} Tflop/s, {gpu.float32_flops / 1e12:.0f} in float32, {gpu.memory / GIGA:.0f} GB; "
        f"{gpu.call * 1e6:.0f} us a call, {gpu.kernels * 1e3:.0f} ms a pass; {machine.network}, {machine.library}",
    )
    values = values_of(model, gpu)
    for layout in LAYOUTS:
        shapes = [shape_of(model, layout, count) for count in ranks]
        _print_memory(model, gpu, layout, shapes, console)
        _print_seconds(layout, shapes, values, machine, console)
        limit = first_limit(shapes, values, machine)
        sentence = f"{layout}: the efficiency stays above a half of that at {ranks[0]} GPUs up to {ranks[-1]}"
        if limit.ranks is not None:
            sentence = (
                f"{layout}: limited first by the {limit.term}: at {limit.ranks} GPUs the efficiency is below a half of "
                f"that at {ranks[0]}; what moves it: {REMEDIES.get(limit.term, 'more samples')}"
            )
        say(console, sentence)


def _print_memory(model: GPT, gpu: GPU, layout: str, shapes: Sequence[Shape], console: Console) -> None:
    found = [memory_of(model, layout, shape) for shape in shapes]
    table = Table(title=f"{layout}: GB of a GPU")
    table.add_column("part")
    for shape in shapes:
        table.add_column(str(shape.ranks), justify="right")
    for name in found[0]:
        table.add_row(name, *(f"{memory[name] / GIGA:.2f}" for memory in found))
    table.add_row(f"all, of {gpu.memory / GIGA:.0f}", *(f"{sum(memory.values()) / GIGA:.2f}" for memory in found))
    console.print(table)


def _print_seconds(
    layout: str, shapes: Sequence[Shape], values: dict[str, float], machine: Machine, console: Console
) -> None:
    table = Table(title=f"{layout}: seconds of an iteration, and calls of a rank")
    table.add_column("term")
    for shape in shapes:
        table.add_column(str(shape.ranks), justify="right")
    found = [predicted(shape, values, machine) for shape in shapes]
    for name in found[0]:
        table.add_row(name, *(f"{seconds[name]:.4f}" for seconds in found))
    table.add_row("iteration", *(f"{sum(seconds.values()):.4f}" for seconds in found))
    calls = [sum(call.times for term in parts(shape).values() for call in term.calls) for shape in shapes]
    table.add_row("calls", *map(str, calls))
    base = sum(found[0].values()) * shapes[0].ranks
    efficiencies = [base / sum(seconds.values()) / shape.ranks for seconds, shape in zip(found, shapes, strict=True)]
    table.add_row("efficiency", *(f"{efficiency:.0%}" for efficiency in efficiencies))
    console.print(table)
