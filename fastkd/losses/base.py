"""A loss function as a module: its arguments are attributes, its published variants presets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from fastkd import checks

_Self = TypeVar("_Self", bound="Loss")


class NumbersAsFloats(nn.Module):
    """A number is checked when it becomes an attribute, and stored as a float."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, checks.option(name, value))


class Loss(NumbersAsFloats):
    """``function`` with its further arguments fixed; each is an attribute."""

    function: ClassVar[Callable[..., Tensor]]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._options = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    @classmethod
    def preset(cls: type[_Self], name: str, **overrides: Any) -> _Self:
        """The published variant ``name``, its coefficient as ``weight``; keyword arguments replace single
        fields of it.
        """
        if name not in cls.presets:
            raise ValueError(f"{cls.__name__} has no preset {name!r}, wanted one of {', '.join(cls.presets)}")
        return cls(**{**cls.presets[name], **overrides})

    def _keywords(self) -> dict[str, Any]:
        """The further arguments by name, as they are now."""
        return {name: getattr(self, name) for name in self._options}

    def forward(self, student: Any, teacher: Any) -> Tensor:
        return type(self).function(student, teacher, **self._keywords())

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._keywords().items())
