"""What the documents name exists. Their examples: test_examples.py; their sizes: test_sizes.py."""

from __future__ import annotations

import dataclasses
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}


def test_the_flags_they_name_exist() -> None:
    known = set(runpy.run_path(str(ROOT / "train.py"))["build_parser"]()._option_string_actions)
    named = set(re.findall(r"`(--[a-z-]+)", TEXTS["docs/training.md"] + TEXTS["docs/recipes.md"]))
    named |= {
        flag
        for text in TEXTS.values()
        for line in re.findall(r"(?<!/)train\.py (.*)", text)  # not tools/train.py of another project
        for flag in re.findall(r"--[a-z-]+", line)
    }
    assert named and named <= known | {"--nproc-per-node"}


def test_the_table_of_methods_is_whole() -> None:
    from fastkd import methods

    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)$", TEXTS["docs/methods.md"], re.MULTILINE))
    assert tuple(rows) == methods.METHODS
    for name in methods.METHODS[1:]:
        kind = methods._KINDS[name]
        if name not in ("kd", "at", "fsp"):  # whose presets stand in docs/losses.md
            presets = re.findall(r"`(\w+)`", rows[name].split("|")[1])
            assert presets == list(kind.presets), name
        options = {field.name for field in dataclasses.fields(kind.Options)}
        named = set(re.findall(r"`(\w+)`", rows[name].split("|")[2]))
        assert named <= options if name == "at" else named == options, name  # whose switches are the loss's


def test_every_public_loss_is_told_and_shown() -> None:
    import fastkd

    text = TEXTS["docs/losses.md"]
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", text, re.MULTILINE)
    losses = [name for name in fastkd.__all__ if name.endswith("_loss")]
    modules = [name for name in fastkd.__all__ if hasattr(getattr(fastkd, name), "preset")]
    assert sorted(name for name, _ in rows) == losses and sorted(name for _, name in rows) == sorted(modules)
    examples = "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    for function, module in rows:
        assert f"fastkd.{function}(" in examples or re.search(rf"fastkd\.{module}\b", examples), function
        for preset in getattr(fastkd, module).presets:
            assert re.search(rf"`{module}\.preset`.*`{preset}`|^\| .*`{preset}`", text, re.MULTILINE), (
                module,
                preset,
            )


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files_and_headings(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name} names {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, (
                f"{name} names {target}"
            )


@pytest.mark.parametrize("name", TEXTS)
def test_tests_and_files_that_they_name_exist(name: str) -> None:
    text = re.sub(r"```.*?```", "", TEXTS[name], flags=re.DOTALL)
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    missing = [test for test in re.findall(r"`(test_\w+)`", text) if f"def {test}(" not in sources]
    places = ("fastkd", "csrc", "tests", "benchmarks", ".ci")
    paths = [path for path in re.findall(r"`([\w./-]+/[\w.-]+\.\w+)`", text) if path.split("/")[0] in places]
    built = {"fastkd/_C.abi3.so", "fastkd/_C_cuda.abi3.so"}  # where a compiler was
    missing += [path for path in paths if path not in built and not (ROOT / path).exists()]
    assert not missing, f"{name} names {missing}"


def test_files_of_the_mutations_exist() -> None:
    rows = re.findall(
        r"^\|.*\|(.*)\|.*\|$", TEXTS["docs/testing.md"].partition("## Mutations")[2], re.MULTILINE
    )
    paths = {path for row in rows for path in re.findall(r"`([^`]+\.\w+)`", row)}
    places = [ROOT / place for place in ("csrc/cpu", "csrc/cuda", "fastkd", "fastkd/kernels")]
    missing = [path for path in paths if not any((place / path).is_file() for place in places)]
    assert len(paths) > 40 and not missing, f"docs/testing.md names {missing}"


def test_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", TEXTS["README.md"]))
    assert linked == {name for name in TEXTS if name.startswith("docs/")}
