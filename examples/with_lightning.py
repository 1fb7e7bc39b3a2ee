"""The same in Lightning: python examples/with_lightning.py"""

import lightning
import torch
import torchvision

import fastkd


class Distill(lightning.LightningModule):
    """The teacher is in no state dict, is saved in no checkpoint, and moves to the device with the rest."""

    def __init__(self) -> None:
        super().__init__()
        stages = ["layer1", "layer2", "layer3"]
        self.distillation = fastkd.Distillation(
            torchvision.models.resnet18(num_classes=10),
            torchvision.models.resnet34(num_classes=10),
            "at+kd",
            student_points=stages,
            teacher_points=stages,
        )

    def on_train_epoch_start(self) -> None:
        self.distillation.set_epoch(self.current_epoch, self.trainer.max_epochs or 1)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        losses = self.distillation(*batch)
        self.log_dict({name: value.detach() for name, value in losses.terms.items()})
        return losses.total

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.distillation.parameters(), 0.01, momentum=0.9)


def main(epochs: int = 2, **options: object) -> Distill:
    lightning.seed_everything(0, verbose=False)
    data = [(torch.randn(3, 32, 32), i % 10) for i in range(8)]
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    model = Distill()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, loader)
    return model


if __name__ == "__main__":
    main()
