"""What looks for batch norms finds none of the teacher's: averaging, Lightning, several processes."""

from __future__ import annotations

import copy

import pytest
import torch
from runs import of_two
from teacher_cases import MEAN, STEPS, VARIANCE, distillation_of, statistics
from torch.optim.swa_utils import AveragedModel, update_bn

AS_TRAINED = [{MEAN}, {VARIANCE}, {STEPS}]
pytestmark = pytest.mark.usefixtures("one_thread")


def batches():
    return [(torch.randn(4, 3, 32, 32), torch.arange(4)) for _ in range(2)]


@pytest.mark.parametrize("foreign", [False, True])
def test_update_bn_leaves_the_teachers_statistics(foreign):
    made = distillation_of(foreign)
    averaged = AveragedModel(made)
    answer = copy.deepcopy(made.eval().ask(torch.ones(1, 3, 32, 32)).logits)
    for model, held in ((made, made), (averaged, averaged.module)):
        update_bn(batches(), model)
        assert statistics(held.teacher) == AS_TRAINED
        assert statistics(held.student)[2] == {2}  # it was reset and filled anew
        assert torch.equal(held.eval().ask(torch.ones(1, 3, 32, 32)).logits, answer)


@pytest.mark.parametrize("foreign", [False, True])
def test_lightnings_averaging_leaves_them_too(lightning, tmp_path, foreign):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.distillation = distillation_of(foreign)

        def training_step(self, batch, _):
            return self.distillation(*batch).total

        def configure_optimizers(self):
            return torch.optim.SGD(self.distillation.parameters(), 0.01)

    callback = lightning.pytorch.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, **quiet
    )
    model = Module()
    trainer.fit(model, torch.utils.data.DataLoader(batches(), batch_size=None))
    assert statistics(model.distillation.teacher) == AS_TRAINED
    assert statistics(model.distillation.student)[2] == {2}  # of the last pass, over the averaged weights


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_the_first_process_sends_no_buffers_of_its_teacher(group, tmp_path):
    answer, logs = group.run(tmp_path, of_two(), call="buffers_of_processes", arguments=[tmp_path / "found"])
    assert answer["statuses"] == [0, 0], logs
    first, second = (torch.load(tmp_path / f"found-{rank}.pt") for rank in (0, 1))
    for foreign in (False, True):
        assert first[foreign][0] == {MEAN} and second[foreign][0] == {MEAN + 1}
        assert first[foreign][1] == second[foreign][1]  # the student's have been sent
