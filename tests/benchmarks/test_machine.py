"""What a measurement says of the machine that ran it."""

from __future__ import annotations

import pytest
from speed import machine


@pytest.mark.parametrize("name", ["AMD EPYC", "Intel(R) Xeon(R) Processor"])
def test_a_processor_without_a_number_in_its_name_is_told_by_family_and_model(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = {"model name": name, "cpu family": "25", "model": "17"}
    monkeypatch.setattr(machine, "_cpuinfo", lambda: info)
    assert machine.cpu_model() == f"{name} family 25 model 17"
    info["model name"] = f"{name} 7763"
    assert machine.cpu_model() == f"{name} 7763"


def test_slug() -> None:
    assert machine.slug("Intel(R) Xeon(R) Processor @ 2.60GHz") == "intel-xeon-processor-2-60ghz"
