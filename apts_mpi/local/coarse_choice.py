"""What coarse level goes with a local solver."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from apts_mpi.errors import InvalidInput
from apts_mpi.local.solver import LocalSolver
from apts_mpi.options import APTSOptions, CoarseOptions

# Of the residual level: the limit of Transtrum and Sethna (arXiv 1201.5885).
USUAL_ACCELERATION = 0.75


def coarse_model(
    options: APTSOptions, solver: type[LocalSolver], may_be_squares: bool
) -> Literal["none", "gauss-newton", "residual"]:
    """What model of the coarse level the options mean; refuse the residual one where it cannot be.

    Parameters
    ----------
    options, solver
        Of the whole solver, and the local one.
    may_be_squares
        Whether the loss is quadratic in the outputs, or nothing is known of it.
    """
    model = options.coarse.model
    if model == "residual":
        _check_residual(options, solver)
    if model != "auto":
        return model
    if options.noise == "batches":
        return "none"
    usual = APTSOptions(layout=options.layout)
    others = replace(options.coarse, acceleration=usual.coarse.acceleration, momentum=usual.coarse.momentum)
    untouched = others == usual.coarse and options.local == usual.local
    # A run that goes on has what it had, which tells the two apart.
    schwarz = options.schwarz.decomposition == "parameters" and options.schwarz.local_data in ("auto", "shared")
    plain = untouched and schwarz and options.schwarz.damping == 1.0 and options.schwarz.overlap == 0
    plain = plain and solver.dense and options.batch == "whole"
    return "residual" if plain and may_be_squares else "gauss-newton"


def _check_residual(options: APTSOptions, solver: type[LocalSolver]) -> None:
    """Refuse what the equations of the residuals cannot have."""
    local_data = options.schwarz.local_data
    if not solver.dense:
        raise InvalidInput(
            f"coarse.model: 'residual' needs the rows of local.solver gauss-newton, not {options.local.solver!r}; "
            "choose gauss-newton for both"
        )
    if options.schwarz.decomposition == "data":
        raise InvalidInput(
            "coarse.model: 'residual' is for subdomains of parameters; choose --schwarz.decomposition parameters, or "
            "gauss-newton"
        )
    if options.schwarz.overlap:
        raise InvalidInput(
            f"schwarz.overlap: {options.schwarz.overlap} is for local solves, and coarse.model residual makes none; "
            "give 0"
        )
    if options.local.iterations > 1:
        raise InvalidInput(
            f"local.iterations: {options.local.iterations} are for local solves, and coarse.model residual makes none; "
            "give 1"
        )
    if local_data not in ("auto", "shared") and options.layout == "replicated":
        raise InvalidInput(
            f"schwarz.local_data: {local_data!r} would give ranks samples twice, which coarse.model residual divides; "
            "choose auto"
        )
    if options.layout == "staged" and options.coarse.acceleration:
        raise InvalidInput(
            f"coarse.acceleration: {options.coarse.acceleration} is not for layout staged; give 0, or null"
        )


def compose_coarse(options: APTSOptions, solver: type[LocalSolver]) -> CoarseOptions:
    """The options of the coarse level, whose model is known, with every ``auto`` replaced by what it stands for."""
    coarse = options.coarse
    if coarse.model != "residual":
        for name, value in (("acceleration", coarse.acceleration), ("momentum", coarse.momentum)):
            if value:
                raise InvalidInput(
                    f"coarse.{name}: {value} is for coarse.model residual, not {coarse.model}; choose that, or leave "
                    "it out"
                )
    norm = solver.coarse_norm if coarse.norm == "auto" else coarse.norm
    samples = solver.coarse_samples if coarse.samples is None else coarse.samples
    acceleration = coarse.acceleration
    if acceleration is None and coarse.model == "residual":
        acceleration = USUAL_ACCELERATION if options.layout == "replicated" else 0.0
    return replace(coarse, norm=norm, samples=samples, acceleration=acceleration)
