"""What a method's name, preset and options mean, before any network is there."""

from __future__ import annotations

import re

import pytest
import torch
import toy_methods
from toy_methods import define

from fastkd import methods
from fastkd.methods import METHODS, BuildContext, create_method
from fastkd.methods.options import written
from fastkd.models import create_model


def options(definition, term):
    return next(found.options for found in definition.terms if found.name == term)


def test_a_sum_has_the_order_of_the_table_whatever_the_user_writes():
    for name in ("fsp+kd+at", "kd+fsp+at", "at+fsp+kd"):
        found = methods.define(name, preset="repdistiller")
        assert (found.name, found.names) == ("at+fsp+kd", ("ce", "at", "fsp", "kd"))
    assert methods.define("baseline").names == ("ce",) and not methods.define("baseline").needs_teacher
    table = ("baseline", "kd", "fitnet", "at", "fsp", "ofd", "rkd")
    assert [name for name in METHODS if name in table] == [name for name in table if name in METHODS]
    assert not [name for name in METHODS if "+" in name]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("at+at", "method 'at+at' has at twice"),
        ("at+", "method 'at+' is not known"),
        ("at+baseline", "method 'at+baseline' is not known"),
        ("ce", "method 'ce' is not known; known: baseline, kd, at, fsp"),
        ("wrapping+doubled", "wrapping and doubled both change the student"),
    ],
)
def test_sums_that_cannot_be_are_refused(name, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        define(name)


def test_kd_has_the_weight_that_its_authors_give_it_beside_another_loss():
    for preset, alone, beside in (
        ("repdistiller", (0.1, 0.9), (1, 1)),
        ("hankyul2", (1, 1), (1, 0.9)),
        ("sakd", (1, 0.9), (1, 0.9)),
    ):
        for name, (ce, weight) in (("kd", alone), ("fsp+kd", beside), ("at+fsp+kd", beside)):
            found = methods.define(name, preset=preset)
            assert (found.ce, options(found, "kd").weight) == (ce, weight), (preset, name)
    # only the sum that was published has cross-entropy at 0.1
    assert (
        methods.define("at+kd", preset="zagoruyko").ce == 0.1
        and methods.define("fsp+kd", preset="zagoruyko").ce == 1
    )


def test_what_the_authors_always_add_comes_with_a_method_once():
    for name in ("toy", "toy+kd"):
        found = define(name)
        assert found.names == ("ce", "toy", "kd") and found.ce == 0.25 and options(found, "kd").weight == 0.5
    assert options(define("toy", words=["kd.weight=3"]), "kd").weight == 3
    assert define("wrapping").names == ("wrapping",)


@pytest.mark.parametrize("name", ["toy+at", "wrapping+at"])
def test_methods_that_disagree_on_cross_entropy_leave_it_to_the_user(name):
    with pytest.raises(ValueError, match=re.escape("--option ce.weight is left open")):
        define(name)
    found = define(name, words=["ce.weight=0.5"])
    assert found.ce == 0.5 and found.changes == {"ce.weight": 0.5}


def test_methods_that_disagree_on_the_recipe_leave_it_to_the_user():
    base = {"teacher_mode": "eval", "momentum": 0.9}
    assert define("toy").recipe(base, ()) == {"teacher_mode": "train"} == define("toy+kd").recipe(base, ())
    assert define("toy").recipe(base, ("teacher_mode",)) == {} == define("at").recipe(base, ())
    found = define("toy+at", words=["ce.weight=1"])
    with pytest.raises(ValueError, match=re.escape("--teacher-mode is left open")):
        found.recipe(base, ())
    assert found.recipe({"teacher_mode": "train"}, ()) == {"teacher_mode": "train"}


def test_a_term_takes_the_best_known_values_where_the_recipe_has_none():
    found = methods.define("at+fsp", preset="mdistiller")
    assert found.others_presets() == {"fsp": "repdistiller"} and found.changes == {}
    found = methods.define("at+fsp", preset="mdistiller", words=["fsp.preset=kdzoo"])
    assert options(found, "fsp").pair_reduce == "mean" and found.changes == {"fsp.preset": "kdzoo"}
    with pytest.raises(
        ValueError, match=r"option fsp.preset is 'mdistiller', wanted one of repdistiller, .*paper"
    ):
        methods.define("fsp", words=["fsp.preset=mdistiller"])


def test_options_come_from_words_and_from_values():
    found = methods.define(
        "at+kd",
        preset="hankyul2",
        words=["at.beta=500", "temperature=2", "stage_reduce=mean", "weights=0.5:1:2"],
    )
    assert (options(found, "at").beta, options(found, "kd").temperature) == (500.0, 2.0)
    assert found.changes == {
        "at.beta": 500.0,
        "at.stage_reduce": "mean",
        "at.weights": (0.5, 1.0, 2.0),
        "kd.temperature": 2.0,
    }
    again = methods.define(
        "at+kd", preset="hankyul2", words=[f"{key}={written(value)}" for key, value in found.changes.items()]
    )
    assert again == found
    given = {"at": {"beta": 500, "stage_reduce": "mean", "weights": [0.5, 1, 2]}, "kd": {"temperature": 2}}
    assert methods.define("at+kd", preset="hankyul2", options=given) == found
    # what repeats the preset is no change
    assert (
        methods.define("at", preset="hankyul2", words=["beta=1000", "signed=true", "weights=none"]).changes
        == {}
    )


@pytest.mark.parametrize(
    ("name", "word", "words"),
    [
        ("at", "beta", "--option is 'beta', wanted NAME.FIELD=VALUE"),
        ("at", "gamma=1", "option 'gamma' is not known, wanted one of at.beta, at.p"),
        ("at+fsp", "beta=1", "option 'beta' stands for several, wanted one of at.beta, fsp.beta"),
        ("at+kd", "weight=1", "option 'weight' stands for several, wanted one of kd.weight, ce.weight"),
        ("at", "at.gamma=1", "option at.gamma is not known, wanted one of at.beta"),
        ("at", "kd.temperature=2", "method at has no term 'kd', so no option kd.temperature"),
        ("at", "beta=x", "option at.beta is 'x', wanted a number"),
        ("at", "beta=nan", "option at.beta is 'nan', wanted a number"),
        ("at", "beta=1,2", "option at.beta is '1,2', wanted a number"),
        ("at", "p=0.5", "option at: p is 0.5, wanted a finite number of at least 1"),
        ("at", "pool=never", "option at.pool is 'never', wanted one of before, after"),
        ("at", "signed=perhaps", "option at.signed is 'perhaps', wanted true or false"),
        ("at", "weights=1:x", "option at.weights is '1:x', wanted numbers with colons between them"),
        ("toy", "width=2.5", "option toy.width is '2.5', wanted a whole number"),
        ("toy", "ce.weight=x", "option ce.weight is 'x', wanted a number"),
    ],
)
def test_words_that_are_no_options_are_refused(name, word, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        define(name, words=[word])
    with pytest.raises(ValueError, match=re.escape("--option at.beta is given twice")):
        define("at", words=["at.beta=1", "beta=2"])


@pytest.mark.parametrize(
    ("value", "wanted"),
    [("x", "a number"), (True, "a number"), (None, "a number"), (float("inf"), "a number")],
)
def test_values_that_are_no_options_are_refused(value, wanted):
    with pytest.raises(ValueError, match=re.escape(f"option at.beta is {value!r}, wanted {wanted}")):
        methods.define("at", options={"at": {"beta": value}})
    with pytest.raises(ValueError, match=r"options\['beta'\] is 500, wanted them by term"):
        methods.define("at", options={"beta": 500})


def test_every_option_has_a_help_and_presets_are_made_of_options():
    for name in METHODS[1:]:
        kind = methods.define(name).terms[0].kind
        assert kind.canonical in kind.presets and re.fullmatch("#[0-9a-f]{6}", kind.colour) and kind.title
        for preset in kind.presets:
            found = methods.define(name, preset=preset)
            assert found.terms[0].preset == preset and found.changes == {}
        assert all(field.metadata["help"] for field in kind.Options.__dataclass_fields__.values())


@pytest.fixture(scope="module")
def context():
    return BuildContext.of(
        create_model("resnet8", 7), create_model("resnet8x4", 7), train_labels=torch.arange(20) % 7
    )


def test_a_context_knows_the_shapes_and_disturbs_nothing():
    student, teacher = create_model("resnet8", 7), create_model("wrn_16_2", 7).eval()
    student.layer1.eval()
    modes, buffers = [m.training for m in student.modules()], [b.clone() for b in student.buffers()]
    state = torch.get_rng_state()
    found = BuildContext.of(student, teacher)
    assert modes == [m.training for m in student.modules()] and all(
        map(torch.equal, buffers, student.buffers())
    )
    assert torch.equal(state, torch.get_rng_state())
    assert (
        found.num_classes == 7
        and found.student_shapes.pooled == (64,)
        and found.teacher_shapes.final == (128, 8, 8)
    )
    assert (
        found.teacher_shapes.preact.stages == ((32, 32, 32), (64, 16, 16), (128, 8, 8))
        and len(found.student_shapes.blocks) == 3
    )


def test_first_weights_depend_on_the_seed_and_the_method_alone(context):
    state = torch.get_rng_state()

    def weights(name, seed=0):
        return define(name, words=["ce.weight=1"]).build(context, seed)[0]["toy"].layers[0].weight

    assert torch.equal(weights("toy"), weights("scheduled+toy+bank")) and not torch.equal(
        weights("toy"), weights("toy", 1)
    )
    assert torch.equal(state, torch.get_rng_state())
    seeds = {define("bank").build(context, seed)[0]["bank"].seed for seed in (0, 0, 1)}
    both = define("toy+bank", words=["ce.weight=1"]).build(context)[0]
    assert len(seeds) == 2 and both["toy"].seed != both["bank"].seed


def test_a_method_that_holds_a_network_is_refused(context):
    with pytest.raises(
        TypeError, match="method thief holds a part of a network of its context, wanted a copy"
    ):
        define("thief").build(context)


def test_a_method_is_made_for_a_context(context):
    found = create_method("at", context, preset="kdzoo", options={"at": {"beta": 3}})
    assert (
        isinstance(found, methods.Distiller)
        and found.function.weight == 3
        and found.function.stage_reduce == "mean"
    )
    assert list(create_method("kd+at", context)) == ["at", "kd"]
    assert toy_methods.KINDS["at"] is type(found)
