"""The same loop with accelerate, on any number of processes: accelerate launch examples/with_accelerate.py"""

import torch
import torchvision
from accelerate import Accelerator

import fastkd


def main(epochs: int = 2) -> fastkd.Distillation:
    torch.manual_seed(0)
    accelerator = Accelerator()
    stages = ["layer1", "layer2", "layer3"]
    distillation = fastkd.Distillation(
        torchvision.models.resnet18(num_classes=10),
        torchvision.models.resnet34(num_classes=10),
        "at+kd",
        student_points=stages,
        teacher_points=stages,
    )
    data = [(torch.randn(3, 32, 32), i % 10) for i in range(8)]
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    optimizer = torch.optim.SGD(distillation.parameters(), 0.01, momentum=0.9)
    # one module holds both networks: several processes refuse a teacher alone, which has no gradient
    model, optimizer, loader = accelerator.prepare(distillation, optimizer, loader)
    for epoch in range(epochs):
        model.train()
        distillation.set_epoch(epoch, epochs)
        for images, labels in loader:
            optimizer.zero_grad()
            losses = model(images, labels)
            accelerator.backward(losses.total)
            optimizer.step()
        accelerator.print(epoch, round(losses.total.item(), 3))
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    main()
