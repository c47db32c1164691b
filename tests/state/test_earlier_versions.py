"""Checkpoints that earlier versions have written go on as they would have there."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI
from networks import make_solver
from processes import PROBLEM, needs_mpirun, start

from apts_mpi import APTSOptions, CoarseOptions, GlobalStepOptions, SchwarzOptions
from apts_mpi.checkpoint import Checkpoint
from apts_mpi.trust_region.same_function import NEW

FILES = Path(__file__).parent / "version_0_1_0"

# The replicated one was saved after a rejection, with the correction to be used again; the staged one by two ranks,
# with the pairs of a global step.
RANKS = {"replicated": 1, "staged": 2}


@pytest.mark.processes
@needs_mpirun
@pytest.mark.parametrize("layout", RANKS)
def test_a_run_goes_on(layout, tmp_path):
    """The losses that follow are those of the version that wrote it; on the machine that wrote it they were so to the
    bit, elsewhere the libraries round otherwise."""
    shutil.copytree(FILES / layout, tmp_path / "saved")
    (saved,) = (tmp_path / "saved").glob("*.h5")
    expected = json.loads((FILES / f"{layout}.json").read_text())
    arguments = [f"--resume={saved}", f"--max-iterations={len(expected)}", "--run-dir=run", "--checkpoint-every=1"]
    done = start(tmp_path, RANKS[layout], [PROBLEM, *arguments])
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    np.testing.assert_allclose(losses, expected, rtol=1e-10)


OPTIONS = {
    "replicated": APTSOptions(
        subdomains=3, coarse=CoarseOptions(columns=("correction", "last_step", "last_correction"))
    ),
    "staged": APTSOptions(
        subdomains=3, schwarz=SchwarzOptions(local_data="full"), global_step=GlobalStepOptions(model="lsr1")
    ),
}


@pytest.mark.parametrize("layout", RANKS)
def test_it_is_saved_again_as_it_was(layout):
    """Taken over and saved without an iteration in between, every array has the same bits; either layout's file is."""
    (path,) = (FILES / layout).glob("*.h5")
    with Checkpoint(path) as before:
        # Stages were cut elsewhere than the subdomains of a whole network are.
        cuts = tuple(record["owned_start"] for record in before.metadata["solver"]["subdomains"])
        chosen = OPTIONS[layout]
        solver = make_solver(MPI.COMM_SELF, replace(chosen, schwarz=replace(chosen.schwarz, cuts=cuts)))
        assert solver.load(before, before.metadata["solver"]) == []
        arrays, metadata = solver.save()
        # A correction waits for its batch; the history is the run's.
        expected = set(before.names) - {"solver/correction", "training/history"}
        assert {array.name for array in arrays} == expected
        for array in arrays:
            (slab,) = array.slabs
            assert np.array_equal(slab.values, before.read(array.name)), array.name
        for name in ("coarse", "local_solver", "subdomains"):
            assert json.loads(json.dumps(metadata[name])) == before.metadata["solver"][name]
        # That version counted no skipped batches, no next batch judged the radius, and no global step came by itself.
        global_step = json.loads(json.dumps(metadata["global_step"]))
        assert (global_step or None) == before.metadata["solver"]["global_step"]
        later = {"skipped": 0, "slope": 0.0, "share": 1.0, "has_end": False, "retry": 1.0, "starting": True}
        later |= {"tried": 0, "walked": 0, "farthest": 0.0, "loss": None, "spread": 0.0, "same": asdict(NEW)}
        assert metadata["state"] == before.metadata["solver"]["state"] | later
