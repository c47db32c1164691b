"""A module of Lightning whose optimizer is APTS: ``python lightning_module.py``."""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from apts_mpi.optim import APTS
from apts_mpi.problems import build


class Digits(lightning.LightningModule):
    """Handwritten digits by a small network."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, number):
        """The loss of a batch."""
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self.network(inputs), targets)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        """APTS on all layers of the module, its steps shorter towards the end."""
        optimizer = APTS(self)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


lightning.seed_everything(0)
loader = DataLoader(TensorDataset(*build("digits").train), batch_size=128, shuffle=True)
trainer = lightning.Trainer(max_epochs=10, accelerator="cpu", logger=False, enable_progress_bar=False)
trainer.fit(Digits(), loader)
print(f"loss {trainer.callback_metrics['loss']:.4f}")
