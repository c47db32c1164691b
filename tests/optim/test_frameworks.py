"""The optimizer where other people's loops hold it: Lightning's automatic optimisation, and HuggingFace's Trainer."""

import os
from pathlib import Path

import pytest
import torch
from mpi4py import MPI
from processes import needs_mpirun, start
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from apts_mpi.optim import APTS

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

# What these libraries say of themselves, and of the machine.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


def classes_of_points():
    inputs = torch.randn(256, 6, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, inputs[:, :4].argmax(dim=1))


def make_module():
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1))
            self.head = nn.Linear(16, 4)
            self.losses = []

        def training_step(self, batch, number):
            loss = nn.functional.cross_entropy(self.head(self.layers(batch[0])), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            optimizer = APTS(self, weight_decay=0.1, comm=MPI.COMM_SELF)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + step / 100))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Module()


def fit(module, epochs, tmp_path, resumed=None, **options):
    import lightning

    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )
    torch.manual_seed(2)
    trainer.fit(module, DataLoader(classes_of_points(), batch_size=32), ckpt_path=resumed)
    return trainer


def test_lightning_optimises_by_it_and_steps_once_a_batch(tmp_path):
    module = make_module()
    trainer = fit(module, 12, tmp_path, gradient_clip_val=10.0)
    assert trainer.global_step == len(module.losses) == 12 * 8
    assert sum(module.losses[-8:]) < 0.3 * sum(module.losses[:8])
    # The running statistics have moved once a batch.
    assert module.layers[1].num_batches_tracked == 12 * 8


def test_lightning_accumulates_and_computes_in_bfloat16(tmp_path):
    module = make_module()
    trainer = fit(module, 16, tmp_path, accumulate_grad_batches=2, precision="bf16-mixed")
    assert trainer.global_step == 16 * 4
    assert sum(module.losses[-8:]) < 0.5 * sum(module.losses[:8])


def test_lightning_resumes_with_the_same_bits(tmp_path):
    whole = make_module()
    whole.layers[3].p = 0.0
    fit(whole, 6, tmp_path / "whole")
    half, other = make_module(), make_module()
    half.layers[3].p = other.layers[3].p = 0.0
    fit(half, 3, tmp_path / "half").save_checkpoint(tmp_path / "half.ckpt", weights_only=False)
    fit(other, 6, tmp_path / "other", resumed=tmp_path / "half.ckpt")
    assert half.losses + other.losses == whole.losses
    for one, two in zip(whole.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def make_trainer(tmp_path, epochs=6, **options):
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=12, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    network = transformers.GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(12, (128, 1), generator=generator)
    tokens = (starts + torch.arange(16) * 5) % 12  # each token tells the next one
    data = [{"input_ids": row, "labels": row} for row in tokens]
    optimizer = APTS(network, comm=MPI.COMM_SELF)
    steps = epochs * 8
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 4, steps)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        logging_steps=8,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        **options,
    )
    return transformers.Trainer(network, arguments, train_dataset=data, optimizers=(optimizer, schedule))


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_trainer_of_transformers_runs_with_it(tmp_path):
    trainer = make_trainer(tmp_path, epochs=16, save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 128
    assert losses_of(trainer)[-1] < 0.5 * losses_of(trainer)[0]


def test_the_trainer_of_transformers_resumes_with_the_same_bits(tmp_path):
    whole = make_trainer(tmp_path / "whole", save_strategy="epoch")
    whole.train()
    other = make_trainer(tmp_path / "other", save_strategy="no")
    other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-24"))
    assert losses_of(other)[-3:] == losses_of(whole)[-3:]
    for one, two in zip(whole.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("program", "ranks"),
    [("plain_loop", None), pytest.param("plain_loop", 2, marks=needs_mpirun), ("lightning_module", None)],
)
def test_the_programs_of_the_page_run_and_learn(program, ranks, tmp_path):
    path = os.pathsep.join(map(str, (EXAMPLES, EXAMPLES.parents[1])))
    job = start(tmp_path, ranks, [], module=program, PYTHONPATH=path)
    assert job.returncode == 0, job.stderr
    assert float(job.stdout.split()[-1]) < 0.05
    assert (tmp_path / "plain_loop.pt").exists() == (program == "plain_loop")
