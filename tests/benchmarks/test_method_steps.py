"""The whole steps of the methods that `pytest --benchmark` measures, on the smallest networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from speed import measure, method_steps, methods, published
from speed.measure import Row
from speed.method_steps import MethodStepGroup
from speed.methods import OURS, PUBLISHED
from speed.stock import Stock
from torch import nn

GROUPS = {group.work.method: group for group in method_steps.groups(full=False)}
# what `published.py` has for each method's loss
FORMS = {"reviewkd": "hcl", "semckd": "calibration"}


def build(group: MethodStepGroup) -> tuple[Any, dict[str, Row]]:
    built = group.build(Stock())
    return built, {name: group.row(built, name) for name in group.names(True)}


def test_every_step_names_a_case_that_is_measured_as_a_loss() -> None:
    cases = {(group.method, group.note) for group in methods.groups(full=True)}
    of = [tuple(group.describe()["of"]) for group in GROUPS.values()]
    assert set(of) <= cases
    # hcl is reviewkd's loss, without its layers
    assert {method for method, _ in of} == {method for method, _ in cases} - {"hcl"}
    assert all(group.rounds[0] >= 2 for group in GROUPS.values())  # quartiles want two


@pytest.mark.parametrize("method", GROUPS)
def test_only_one_of_the_forms_is_the_published_one(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group, name = GROUPS[method], FORMS.get(method, method)
    built, rows = build(group)
    calls: list[str] = []
    form = getattr(published, name)
    monkeypatch.setattr(published, name, lambda *x, **y: (calls.append(name), form(*x, **y))[1])
    found = {}
    for which, row in rows.items():
        calls.clear()
        group.check(built, row)
        assert row.failed is None and row.guess is not None and row.guess > 0
        found[which] = len(calls)
    assert found == {PUBLISHED: 1, OURS: 0}


@pytest.mark.parametrize("method", ["dkd", "crd", "reviewkd"])
def test_a_form_that_gives_another_loss_has_no_speed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = FORMS.get(method, method)
    form = getattr(published, name)
    monkeypatch.setattr(published, name, lambda *x: 1.05 * form(*x))
    built, rows = build(GROUPS[method])
    GROUPS[method].check(built, rows[OURS])
    assert (rows[OURS].failed or "").startswith("wrong: relative error")


def test_a_gradient_that_is_wrong_has_no_speed() -> None:
    group = GROUPS["dkd"]
    built, rows = build(group)
    function = built.distillations[OURS].methods["dkd"].function
    function.register_forward_hook(lambda module, inputs, loss: 2 * loss - loss.detach())
    group.check(built, rows[OURS])
    errors = rows[OURS].facts["error"]
    assert errors["loss"] < 1e-4 < 2e-2 < errors["gradient"] and rows[OURS].failed


def test_each_form_has_its_layout_and_its_teacher() -> None:
    built, rows = build(GROUPS["dkd"])
    for name, form, folded in (
        (PUBLISHED, torch.contiguous_format, False),
        (OURS, torch.channels_last, True),
    ):
        distillation = built.distillations[name]
        (frozen,) = distillation._frozen
        norms = [x for x in frozen.answering.modules() if isinstance(x, nn.BatchNorm2d)]
        assert bool(norms) != folded and not frozen.answering.training
        maps: list[torch.Tensor] = []
        distillation.student.layer1.register_forward_hook(lambda module, x, y: maps.append(y))
        with rows[name].context():
            rows[name].run()
        assert maps[0].is_contiguous(memory_format=form)


def test_a_check_begins_where_the_first_one_did_and_steps_leave_the_weights() -> None:
    group = GROUPS["crd"]
    built, rows = build(group)
    for name, row in rows.items():
        before = {key: value.clone() for key, value in built.distillations[name].state_dict().items()}
        group.check(built, row)
        first = row.facts["error"]["loss"]
        after = built.distillations[name].state_dict()
        moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
        assert {key for key in moved if "bank" in key} == {
            f"methods.crd.function.{side}_bank" for side in ("student", "teacher")
        }
        assert all("bank" in key or "running" in key or "num_batches" in key for key in moved)
        moved_on = row.run().item()
        group.check(built, row)
        assert row.facts["error"]["loss"] == first
        assert abs(moved_on - built.exact[0]) > 10 * first * abs(built.exact[0])


def test_a_row_whose_check_took_long_is_not_tried_again() -> None:
    turns: list[str] = []

    def row(name: str, guess: float | None) -> Row:
        return Row(name, lambda: None, turn=lambda *_: turns.append(name) or 0.2, guess=guess)

    made = [row("a", 1.0), row("b", 1e-3), row("c", None)]
    measure.interleave(made, "wall", budget=0, bounds=(3, 3))
    assert [turns.count(name) for name in "abc"] == [3, 5, 5]
    assert [len(r.seconds) for r in made] == [3, 3, 3]
