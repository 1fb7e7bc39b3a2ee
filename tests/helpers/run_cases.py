"""Settings, rows and errors of runs."""

from __future__ import annotations

from fastkd.training import Settings


def settings_of(output, method="kd", **changes):
    overrides = {"epochs": 1, "batch_size": 32, **changes.pop("overrides", {})}
    common = {
        "dataset": "digits",
        "teacher": "resnet8",
        "student": "resnet8",
        "device": "cpu",
        "pictures": False,
    }
    return Settings(method, output=output, overrides=overrides, **{**common, **changes})


def error_of(main, capsys, flags, status=2):
    """The one line of a command that ends with status 2, or another one."""
    capsys.readouterr()
    assert main(flags) == status
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("train.py: error: ")
    return err
