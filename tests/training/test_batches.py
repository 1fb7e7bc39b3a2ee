"""Batches against one image at a time: crops, order, the last batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastkd.training import Batches

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def small_set(count=24):
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), torch.arange(count)


def normalized(image):
    return (image.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize("pad_mode", ["reflect", "zero"])
@pytest.mark.parametrize("flip", [True, False])
def test_each_image_is_a_crop_of_its_own_padded_original(pad_mode, flip):
    images, labels = small_set()
    batches = Batches(images, labels, MEAN, STD, batch_size=7, seed=3, flip=flip, pad_mode=pad_mode)
    assert len(batches) == 4
    places, mirrored, order = set(), set(), []
    for epoch in range(1, 4):
        for batch, which in batches.train(epoch):
            assert batch.is_contiguous(memory_format=torch.channels_last)
            for image, label in zip(batch, which.tolist(), strict=True):
                order.append(label)
                padded = F.pad(
                    images[label : label + 1].float(),
                    (4,) * 4,
                    mode="reflect" if pad_mode == "reflect" else "constant",
                )[0]
                crops = padded.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).reshape(81, 3, 32, 32)
                crops = torch.cat([crops, crops.flip(-1)])
                near = torch.isclose(normalized(crops), image, atol=1e-5)
                found = near.flatten(1).all(1).nonzero().flatten().tolist()
                assert len(found) == 1
                places.add(found[0] % 81)
                mirrored.add(found[0] >= 81)
    assert (
        all(sorted(order[i : i + 24]) == list(range(24)) for i in (0, 24, 48)) and order[:24] != order[24:48]
    )
    assert mirrored == ({True, False} if flip else {False})
    assert len(places) > 25  # 72 draws of 81 places


def test_crops_begin_at_each_of_nine_places_on_either_axis():
    images, labels = torch.zeros(500, 3, 32, 32, dtype=torch.uint8), torch.arange(500)
    batches = Batches(images, labels, MEAN, STD, batch_size=100)
    which, top, left, flipped = torch.cat([*batches.draw(1)]).unbind(1)
    assert which.sort().values.equal(labels) and not top.equal(left)
    for corner in (top, left):
        counts = corner.bincount()
        assert len(counts) == 9 and counts.min() > 20  # of 500 / 9
    assert 200 < flipped.sum() < 300


def test_an_epoch_depends_on_seed_stream_and_number_alone():
    images, labels = small_set()

    def epoch(number, warm_up=(), **options):
        batches = Batches(images, labels, MEAN, STD, batch_size=8, **{"seed": 1, **options})
        for other in warm_up:
            list(batches.train(other))
        torch.manual_seed(number)
        return torch.cat([batch for batch, _ in batches.train(number)])

    assert torch.equal(epoch(5), epoch(5, warm_up=(1, 2)))
    for other in (epoch(6), epoch(5, seed=2), epoch(5, stream="teacher")):
        assert not torch.equal(epoch(5), other)


@pytest.mark.parametrize(("drop_last", "sizes"), [(True, [10, 10]), (False, [10, 10, 4])])
def test_the_last_batch_is_dropped_only_when_asked(drop_last, sizes):
    images, labels = small_set()
    batches = Batches(images, labels, MEAN, STD, batch_size=10, drop_last=drop_last, dtype=torch.bfloat16)
    assert (
        [len(y) for _, y in batches.train(1)]
        == [len(y) for _, y in batches.test()]
        == sizes
        == [len(x) for x, _ in batches.test()]
    )
    x, y = next(batches.test())
    assert x.dtype == torch.bfloat16 and y.tolist() == list(range(10))
    expected = torch.stack([normalized(image) for image in images[:10]])
    torch.testing.assert_close(x.float(), expected, rtol=2**-8, atol=1e-3)
