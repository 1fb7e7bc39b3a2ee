"""The options of the attention-transfer loss are the same bits in Python and in C++, and are validated with
their types.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from support import values

import fastkd
from fastkd.ops._options import BIT, SWITCHES, AttentionOptions, validated_once

HEADER = Path(fastkd.__file__).parent.parent / "csrc" / "common" / "attention_options.h"
DEFAULTS = {
    name: p.default
    for name, p in list(inspect.signature(fastkd.attention_transfer_loss).parameters.items())[2:]
}


@pytest.mark.skipif(not HEADER.is_file(), reason="no C++ sources here")
def test_each_bit_is_the_same_in_cpp():
    """A line of the header reads `kPoolMax = 16,  // pool_mode: "max", else "avg"`, or, for True and False,
    `kSigned = 2,  // signed`.
    """
    line = re.compile(r'^\s*k\w+ = (\d+),\s*// (\w+)(?:: "(\w+)", else "(\w+)")?$', re.M)
    found = {
        name: (int(bit), (clear or False, value or True))
        for bit, name, value, clear in line.findall(HEADER.read_text())
    }
    assert found == {name: (BIT[name], SWITCHES[name]) for name in SWITCHES}
    assert f"kSwitchesEnd = {1 << len(SWITCHES)}," in HEADER.read_text()


def test_the_options_are_the_arguments_of_the_loss():
    assert AttentionOptions._fields == tuple(DEFAULTS)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_sets_its_own_bit(name):
    bits = [AttentionOptions(**{**DEFAULTS, name: value}).bits() for value in SWITCHES[name]]
    assert bits[1] - bits[0] == BIT[name]


def test_what_was_found_right_is_not_taken_for_what_equals_it():
    given = tuple(DEFAULTS.values())
    assert validated_once((1.0, *given[1:])) == validated_once((1, *given[1:]))
    for p in (True, torch.ones(())):
        with pytest.raises(TypeError, match="p is"):
            validated_once((p, *given[1:]))
    assert validated_once((*given[:9], [1, 2.5], *given[10:]))[3] == [1.0, 2.5]
    x = values((2, 3, 4, 4), torch.float32)
    with pytest.raises(TypeError, match="weight is"):
        fastkd.attention_transfer_loss(x, x, weight=True)
