"""The benchmark of what steps wait for images, on a few of them."""

from __future__ import annotations

import re

import pytest
import waiting

pytest.importorskip("PIL")
FEW = "--teacher resnet8 --student resnet8 --images 12 --batch-size 4 --image-size 32 --workers 0".split()


def test_it_trains_an_epoch_and_says_what_was_waiting(capsys, one_thread):
    assert waiting.main(FEW) == 0
    said = capsys.readouterr().out
    assert re.search(r"12 JPEGs of [1-9]\d kB, batch 4, 0 workers, images of 32 pixels a side", said)
    share = re.search(r"resnet8 from resnet8: \d+ ms a step, of which (\d+\.\d\d) % waiting", said)
    # without workers reading is waiting, and the run says so from 5 % on
    assert ("waiting for images: --workers is 0" in said) == (float(share[1]) > 5)


def test_steps_that_sleep_wait_where_reading_is_the_slower(capsys, monkeypatch, one_thread):
    assert waiting.main([*FEW, "--paces", "10,100000"]) == 0
    slow, fast = (float(x) for x in re.findall(r"images/s: (\d+\.\d) % waiting", capsys.readouterr().out))
    assert slow < fast and fast > 50
