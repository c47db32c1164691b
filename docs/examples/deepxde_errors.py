"""Errors of deepxde's own Adam and L-BFGS on the examples beside this file, after some seconds of the processor.

python docs/examples/deepxde_errors.py deepxde_burgers 30
"""

import importlib
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("DDE_BACKEND", "pytorch")

import deepxde as dde
import torch

sys.path.insert(0, str(Path(__file__).parent))

RATES = (1e-3, 3e-3)


class Limit(dde.callbacks.Callback):
    """Ends training after some seconds of the processor."""

    def __init__(self, seconds):
        super().__init__()
        self._end = time.process_time() + seconds

    def on_epoch_end(self):
        """After each step, or each call of L-BFGS."""
        self.model.stop_training = time.process_time() > self._end


def error(name, optimizer, rate, seconds):
    """Relative L2 error at the test points, the network of seed 0."""
    torch.manual_seed(0)
    data, network = importlib.import_module(name).data_and_network()
    model = dde.Model(data, network)
    model.compile(optimizer, lr=rate, verbose=0)
    model.train(iterations=10**6, display_every=10**7, callbacks=[Limit(seconds)], verbose=0)
    points, solution, _ = data.test()
    return dde.metrics.l2_relative_error(solution, model.predict(points)), model.train_state.step


def main(name, seconds):
    """Print a line for each optimizer."""
    dde.optimizers.set_LBFGS_options(maxiter=10**6, ftol=0, gtol=1e-12)
    for optimizer, rate in [*(("adam", rate) for rate in RATES), ("L-BFGS", None)]:
        found, steps = error(name, optimizer, rate, seconds)
        print(f"{name} {optimizer} {rate or ''}: {found:.1e} after {steps} steps", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
