"""The same on several processes: torchrun --nproc-per-node 2 examples/with_ddp.py"""

import torch
import torchvision
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import fastkd


def main(epochs: int = 2) -> None:
    distributed.init_process_group("gloo")  # nccl on GPUs
    torch.manual_seed(0)
    stages = ["layer1", "layer2", "layer3"]
    distillation = fastkd.Distillation(
        torchvision.models.resnet18(num_classes=10),
        torchvision.models.resnet34(num_classes=10),
        "at+kd",
        student_points=stages,
        teacher_points=stages,
    )
    model = DistributedDataParallel(distillation)  # the teacher is outside: nothing of it is sent
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    data = [(torch.randn(3, 32, 32), i % 10) for i in range(8)]
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=2, sampler=sampler)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        model.train()
        distillation.set_epoch(epoch, epochs)
        for images, labels in loader:
            optimizer.zero_grad()
            losses = model(images, labels)
            losses.total.backward()
            optimizer.step()
    weights = torch.cat([parameter.detach().flatten() for parameter in distillation.student.parameters()])
    others = [torch.empty_like(weights) for _ in range(distributed.get_world_size())]
    distributed.all_gather(others, weights)
    print(f"rank {distributed.get_rank()}: students equal {all(torch.equal(weights, x) for x in others)}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
