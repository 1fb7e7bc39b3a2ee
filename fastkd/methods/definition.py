"""A method by its name: the terms of a sum, their options and weights; no network is needed yet."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastkd.methods.base import Beside, BuildContext, Distiller, option, overrides
from fastkd.methods.options import Nested, convert, filled, from_words
from fastkd.seeds import seeded


@dataclass(frozen=True)
class CrossEntropy:
    """The options of cross-entropy, which is in every sum whose terms want it."""

    weight: float = option(1.0, "factor of cross-entropy")


@dataclass(frozen=True)
class Term:
    """One method of a sum. ``preset`` is the one whose values its ``options`` begin with.

    ``until``: how many epochs it takes part in; None: all.
    """

    name: str
    kind: type[Distiller]
    preset: str
    options: Any
    changes: Mapping[str, Any]
    until: int | None = None

    @property
    def begins(self) -> bool:
        """Whether it is alone in a first phase, where the recipe has one."""
        return self.kind.begins(self.options)


@dataclass(frozen=True)
class Definition:
    """What a method is made of. ``changes``: options by name ("at.beta") whose values are not the preset's,
    in the order of the terms.
    """

    name: str
    terms: tuple[Term, ...]
    ce: float
    preset: str
    changes: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the loss's terms, "ce" first where it has a weight."""
        return (*["ce"][: self.ce != 0], *(term.name for term in self.terms))

    @property
    def needs_teacher(self) -> bool:
        return bool(self.terms)

    @property
    def initializes(self) -> bool:
        return any(term.begins for term in self.terms)

    @property
    def wraps(self) -> bool:
        """Whether a term changes the student."""
        return any(overrides(term.kind, "wrap_student") for term in self.terms)

    @property
    def whole_batches(self) -> bool:
        return any(term.kind.whole_batches for term in self.terms)

    def initialization(self) -> Definition:
        """The terms that may initialize the student, alone."""
        return dataclasses.replace(self, terms=tuple(t for t in self.terms if t.begins), ce=0.0)

    def after_initialization(self) -> Definition:
        return dataclasses.replace(self, terms=tuple(t for t in self.terms if not t.begins))

    def others_presets(self) -> dict[str, str]:
        """By term, the preset of those terms whose values are not those of the recipe's authors."""
        return {term.name: term.preset for term in self.terms if term.preset != self.preset}

    def recipe(self, base: Mapping[str, Any], said: Collection[str]) -> dict[str, Any]:
        """The fields of the recipe that the terms change, but for those in ``said``. Raises ValueError where
        two terms disagree.
        """
        wanted: dict[str, dict[str, Any]] = {}
        wishes = {
            term.name: term.kind.presets[term.preset].recipe for term in self.terms if term.name != "kd"
        }
        for key in dict.fromkeys(key for wish in wishes.values() for key in wish if key not in said):
            wanted[key] = {name: wish.get(key, base[key]) for name, wish in wishes.items()}
        return {key: _agreed(values, f"--{key.replace('_', '-')}") for key, values in wanted.items()}

    def wrap(self, context: BuildContext) -> nn.Module:
        """The student as a term of the sum changes it, with new weights where it adds any."""
        student = context.student
        for term in self.terms:
            if overrides(term.kind, "wrap_student"):
                student = term.kind(context, term.options).wrap_student(student)
        return student

    def build(self, context: BuildContext, seed: int = 0) -> tuple[dict[str, Distiller], nn.Module]:
        """The distillers by name, in the order of the sum, and the student, perhaps wrapped.

        A method that wraps the student is built first: the others see the network that will be trained.
        """
        built: dict[str, Distiller] = {}
        for term in sorted(self.terms, key=lambda term: not overrides(term.kind, "wrap_student")):
            if term.kind.reads_logits_alone:
                context.same_classes(term.name)
            with seeded(seed, "method", term.name):
                made = built[term.name] = term.kind(context, term.options)
            stored = {
                id(parameter)
                for network in (context.student, context.teacher)
                for parameter in network.parameters()
            }
            if any(id(parameter) in stored for parameter in made.parameters()):
                raise TypeError(f"method {term.name} holds a part of a network of its context, wanted a copy")
            if overrides(term.kind, "wrap_student"):
                with seeded(seed, "method", term.name, "wrap"):
                    context = context.with_student(made.wrap_student(context.student))
        return {term.name: built[term.name] for term in self.terms}, context.student


def define(
    kinds: Mapping[str, type[Distiller]],
    name: str,
    preset: str | None,
    options: Mapping[str, Mapping[str, Any]] | None,
    words: Iterable[str] = (),
) -> Definition:
    """See :func:`fastkd.methods.define`. ``kinds``: all methods in the order of the table."""
    names = names_of(kinds, name)
    given = _given({name: kinds[name].Options for name in names}, options or {}, words)
    known = dict.fromkeys(known for kind in kinds.values() for known in kind.presets)
    preset = (kinds[names[0]].canonical if names else next(iter(known))) if preset is None else preset
    if preset not in known:
        raise ValueError(f"preset {preset!r} is not known; known: {', '.join(known)}")
    make = functools.partial(_term, kinds, preset, given)
    terms = [make(name) for name in names if name != "kd"]
    published = len(terms) == 1 and "kd" in names and terms[0].preset == preset
    beside = {term.name: _beside(term, "kd" in names, published) for term in terms}
    # what the methods' authors add, whether the user asks for KD or not
    added = {name: wish.kd for name, wish in beside.items() if wish.kd}
    if not terms and names:
        terms = [make("kd")]
        beside = {"kd": kinds["kd"].presets[terms[0].preset].beside}
    elif "kd" in names or added:
        weight = kinds["kd"].presets[_preset_of(kinds["kd"], "kd", preset, given)].beside.kd
        if added:
            decided = "weight" in given.get("kd", {})
            weight = next(iter(added.values())) if decided else _agreed(added, "--option kd.weight")
        terms.append(make("kd", {"weight": weight}))
    unread = [section for section in given if section not in ("ce", *(term.name for term in terms))]
    if unread:
        raise ValueError(
            f"method {name} has no term {unread[0]!r}, so no option"
            f" {unread[0]}.{next(iter(given[unread[0]]), '')}"
        )
    ce, changes = _cross_entropy({name: wish.ce for name, wish in beside.items()}, given.get("ce", {}))
    for term in terms:
        changes.update(term.changes)
    return Definition("+".join(names) or "baseline", tuple(terms), ce, preset, changes)


def names_of(kinds: Mapping[str, Any], name: str) -> list[str]:
    """The terms of a sum in the order of the table, KD last. Raises ValueError."""
    asked = [] if name == "baseline" else name.split("+")
    for part in asked:
        if part not in kinds:
            raise ValueError(
                f"method {name!r} is not known; known: {', '.join(['baseline', *kinds])}, and sums such as"
                " at+kd"
            )
        if asked.count(part) > 1:
            raise ValueError(f"method {name!r} has {part} twice")
    wrapping = [part for part in asked if overrides(kinds[part], "wrap_student")]
    if len(wrapping) > 1:
        raise ValueError(f"method {name!r}: {' and '.join(wrapping)} both change the student, only one can")
    return sorted(asked, key=lambda part: (part == "kd", list(kinds).index(part)))


def _given(
    sections: Mapping[str, type], options: Mapping[str, Mapping[str, Any]], words: Iterable[str]
) -> Nested:
    """Options as Python values and as words of the command line, by section."""
    if not isinstance(options, Mapping):
        raise TypeError(f'options is {options!r}, wanted them by term: {{"at": {{"beta": 500}}}}')
    for section, values in options.items():
        if not isinstance(values, Mapping):
            raise ValueError(
                f'options[{section!r}] is {values!r}, wanted them by term: {{"at": {{"beta": 500}}}}'
            )
    given: Nested = {section: dict(values) for section, values in options.items()}
    for section, values in from_words(words, {**sections, "ce": CrossEntropy}).items():
        given[section] = {**given.get(section, {}), **values}
    return given


def _preset_of(kind: type[Distiller], name: str, preset: str, given: Nested) -> str:
    """The preset that the user names, else the recipe's, else the method's canonical one."""
    chosen = given.get(name, {}).get("preset")
    if chosen is None:
        return preset if preset in kind.presets else kind.canonical
    if chosen not in kind.presets:
        raise ValueError(f"option {name}.preset is {chosen!r}, wanted one of {', '.join(kind.presets)}")
    return str(chosen)


def _term(
    kinds: Mapping[str, type[Distiller]], preset: str, given: Nested, name: str, base: Mapping[str, Any] = {}
) -> Term:
    kind, said = kinds[name], given.get(name, {})
    chosen, usual = _preset_of(kind, name, preset, given), _preset_of(kind, name, preset, {})
    start = {**kind.presets[chosen].options, **base}
    plain = filled(name, kind.Options, start, {})
    own = {key: value for key, value in said.items() if key not in ("preset", "until")}
    options = filled(name, kind.Options, start, own)
    changes = {f"{name}.preset": chosen} if chosen != usual else {}
    pairs = {
        field.name: (getattr(plain, field.name), getattr(options, field.name))
        for field in dataclasses.fields(kind.Options)
    }
    changes |= {f"{name}.{key}": found for key, (before, found) in pairs.items() if found != before}
    until = convert(f"{name}.until", int | None, said.get("until"))
    if until is not None:
        if until < 1:
            raise ValueError(
                f"option {name}.until is {until}, wanted at least 1: the epochs that it takes part in"
            )
        changes[f"{name}.until"] = until
    return Term(name, kind, chosen, options, changes, until)


def _beside(term: Term, with_kd: bool, published: bool) -> Beside:
    """What is trained beside the term. What was published for the sum with KD stands for that sum alone."""
    preset = term.kind.presets[term.preset]
    return term.kind.beside(
        term.options, preset if published else dataclasses.replace(preset, with_kd=None), with_kd
    )


def _cross_entropy(wanted: Mapping[str, float], said: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """(the weight of cross-entropy, {"ce.weight": weight} if the user changed it)."""
    if not said:
        return (_agreed(wanted, "--option ce.weight") if wanted else 1.0), {}
    weight = filled("ce", CrossEntropy, {}, said).weight
    return weight, {} if {*wanted.values()} == {weight} else {"ce.weight": weight}


def _agreed(wanted: Mapping[str, Any], decides: str) -> Any:
    """The value that all of ``wanted`` have. Raises ValueError, which names the flag ``decides``."""
    values = list(wanted.values())
    if any(value != values[0] for value in values):
        told = ", ".join(f"{value} by {name}" for name, value in wanted.items())
        raise ValueError(
            f"{decides} is left open: the methods of the sum are trained with different values ({told});"
            " give it"
        )
    return values[0]
