"""Two networks of torchvision in a loop of one's own: python examples/plain_loop.py"""

import torch
import torchvision

import fastkd


def main(epochs: int = 2) -> fastkd.Distillation:
    torch.manual_seed(0)
    student = torchvision.models.resnet18(num_classes=10)
    teacher = torchvision.models.resnet34(num_classes=10)  # with trained weights, in earnest
    data = [(torch.randn(3, 32, 32), i % 10) for i in range(8)]
    loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    stages = ["layer1", "layer2", "layer3"]
    distillation = fastkd.Distillation(
        student, teacher, "at+kd", student_points=stages, teacher_points=stages
    )
    optimizer = torch.optim.SGD(distillation.parameters(), 0.01, momentum=0.9)
    for epoch in range(epochs):
        distillation.train()
        distillation.set_epoch(epoch, epochs)
        for images, labels in loader:
            optimizer.zero_grad()
            with torch.autocast(
                "cpu", torch.bfloat16
            ):  # entered in each step: it keeps copies of the weights
                losses = distillation(images, labels)
            losses.total.backward()
            optimizer.step()
        print(epoch, {name: round(value.item(), 3) for name, value in losses.terms.items()})
    return distillation  # distillation.student is what is tested and saved


if __name__ == "__main__":
    main()
