"""The options of the losses are the same bits in Python and in C++, and are validated with their types."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from support import values

import fastkd
from fastkd._bits import ATTENTION, FSP
from fastkd.ops._options import AttentionOptions, FSPOptions, attention_options, fsp_options

HEADERS = Path(fastkd.__file__).parent.parent / "csrc" / "common"
PACKINGS = {"attention_options.h": ATTENTION, "fsp_options.h": FSP}
LOSSES = {fastkd.attention_transfer_loss: (AttentionOptions, ATTENTION), fastkd.fsp_loss: (FSPOptions, FSP)}
PER_CALL = {"student_grad", "teacher_grad", "with_grad", "prepare", "negate", "a_grad", "b_grad"}


def defaults(loss):
    parameters = list(inspect.signature(loss).parameters.items())[2:]
    return {name: p.default for name, p in parameters}


DEFAULTS = defaults(fastkd.attention_transfer_loss)


@pytest.mark.skipif(not HEADERS.is_dir(), reason="no C++ sources here")
@pytest.mark.parametrize("header", PACKINGS)
def test_each_bit_is_the_same_in_cpp(header):
    """A line of the header reads `kPoolMax = 16,  // pool_mode: "max", else "avg"`, or, for one of several
    values, `kIeee = 16,  // precision: "ieee"`, or, for True and False, `kSigned = 2,  // signed`.
    """
    packing, text = PACKINGS[header], (HEADERS / header).read_text()
    line = re.compile(r'^\s*k\w+ = (\d+),\s*// (\w+)(?:: "(\w+)"(?:, else "(\w+)")?)?$', re.M)
    found = {}
    for bits, name, value, clear in line.findall(text):
        found[name, value or True] = int(bits)
        if clear:
            assert packing.bits(name, clear) == 0
    every = {
        (name, value): packing.bits(name, value)
        for name in packing.choices
        for value in packing.choices[name]
    }
    assert found == {key: bits for key, bits in every.items() if bits}
    assert re.search(rf"k\w*End = {packing.end},", text)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_options_are_the_arguments_of_the_loss(loss):
    options, packing = LOSSES[loss]
    assert options._fields == tuple(defaults(loss))
    assert set(packing.choices) <= {*options._fields, *PER_CALL}


@pytest.mark.parametrize("loss", LOSSES)
def test_an_option_sets_its_own_bits(loss):
    options, packing = LOSSES[loss]
    for name in packing.choices.keys() - PER_CALL:
        for value in packing.choices[name]:
            bits = options(**{**defaults(loss), name: value}).bits()
            for other in packing.choices.keys() - PER_CALL:
                wanted = value if other == name else defaults(loss)[other]
                assert packing.value(bits, other) == wanted


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)
def test_bits_that_no_option_has_are_refused(packing):
    for options in (-1, packing.end):
        with pytest.raises(ValueError, match="options must be bits below"):
            packing.check(options)
    packing.check(0)
    with pytest.raises(ValueError, match="options name no distance"):
        FSP.check(12)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_operator_refuses_bits_and_numbers_that_no_call_has(cpp, loss):
    x = [values((2, 3, 4, 4), torch.float32)] * 3
    operator = getattr(torch.ops.fastkd, loss.__name__)
    given = {"attention_transfer_loss": [0.0, 2.0, 1e-12, 1.0], "fsp_loss": [0.0, 1.0]}[loss.__name__]
    operator(x, x, 0, given)
    for options in (-1, LOSSES[loss][1].end):
        with pytest.raises(RuntimeError, match="options must be bits below"):
            operator(x, x, options, given)
    for numbers in (given[:-1], [*given, 1.0]):
        with pytest.raises(RuntimeError, match="numbers must hold"):
            operator(x, x, 0, numbers)


def test_what_was_found_right_is_not_taken_for_what_equals_it():
    given = tuple(DEFAULTS.values())
    assert attention_options((1.0, *given[1:])) == attention_options((1, *given[1:]))
    for p in (True, torch.ones(())):
        with pytest.raises(TypeError, match="p is"):
            attention_options((p, *given[1:]))
    assert attention_options((*given[:9], [1, 2.5], *given[10:]))[1][3:] == (1.0, 2.5)
    x = values((2, 3, 4, 4), torch.float32)
    with pytest.raises(TypeError, match="weight is"):
        fastkd.attention_transfer_loss(x, x, weight=True)


def test_the_weights_of_pairs_are_numbers():
    given = tuple(defaults(fastkd.fsp_loss).values())
    assert fsp_options((*given[:3], [1, 2.5], *given[4:]))[1] == (1.0, 1.0, 2.5)
    for weights, word in (([], "0 numbers"), ([True], "weights")):
        with pytest.raises((TypeError, ValueError), match=word):
            fsp_options((*given[:3], weights, *given[4:]))
