"""The same seeds give the same bits as before, on a machine of which digests are written down."""

from __future__ import annotations

import copy
import hashlib
import math

import digests
import pytest
import torch

from fastkd.training import RECIPES


@pytest.fixture(scope="module")
def here():
    """This machine's entry of the table, and what it finds now."""
    entries, facts = digests.table(), digests.ask("machine")
    if others := digests.differing(facts, entries):
        pytest.skip(f"digests were made elsewhere: {'; '.join(others)}")
    (entry,) = (entry for entry in entries if entry["machine"] == facts)
    return entry["digests"], digests.ask("of_recipes", *RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_the_bits_that_are_written_down(here, recipe):
    written, found = here
    assert recipe in written, "no digest yet: python tests/helpers/digests.py"
    assert found[recipe] == written[recipe]


def test_one_bit_of_a_number_changes_the_digests():
    recipe, plain = RECIPES["kdzoo"], "kdzoo --epochs 1"
    changed = []
    for name in ("weight_decay", "momentum"):
        next_one = torch.nextafter(torch.tensor(getattr(recipe, name)), torch.tensor(math.inf))  # in float32
        changed.append(f"{plain} --{name.replace('_', '-')} {next_one.item()}")
    found = digests.ask("of_recipes", plain, *changed)
    for job in changed:
        assert found[job]["weights"] != found[plain]["weights"], job


def test_weights_are_told_apart_by_a_bit_a_name_and_a_shape():
    state = {"a": torch.ones(2, 3), "b": torch.zeros(2)}
    others = [copy.deepcopy(state) for _ in range(4)]
    others[0]["a"].view(torch.int32)[1, 2] += 1
    others[1]["b"][1] = -0.0
    others[2]["c"] = others[2].pop("b")
    others[3]["a"] = others[3]["a"].t()
    found = set()
    for one in (state, *others):
        digests.add_weights(digest := hashlib.sha256(), one)
        found.add(digest.hexdigest())
    digests.add_weights(digest := hashlib.sha256(), dict(reversed(state.items())))
    assert len(found) == 5 and digest.hexdigest() in found


def test_what_differs_from_the_nearest_machine_is_named():
    facts = {"torch": "2.14.1", "amx": "True", "code_path": "avx512"}
    near, far = {**facts, "amx": "False"}, {"torch": "2.11.0", "amx": "False", "code_path": "avx2"}
    entries = [{"machine": far}, {"machine": near}]
    assert digests.differing(facts, entries) == ["amx is 'True', there 'False'"]
    assert digests.differing(facts, [*entries, {"machine": facts}]) == []
    assert digests.differing(facts, []) == ["the table is empty"]
