"""The command in a folder with a user's file of networks and images."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folder_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``nets.py`` and ``images``, for the tests of one module."""
    pytest.importorskip("PIL")
    from image_folders import NETWORKS, make_images

    place = tmp_path_factory.mktemp("place")
    (place / "nets.py").write_text(NETWORKS)
    make_images(place / "images")
    return place


@pytest.fixture
def folder_main(monkeypatch: pytest.MonkeyPatch, folder_place: Path, one_thread):
    """``train.py``'s main, run in that folder; ``image_folders.FLAGS`` are flags for it."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    monkeypatch.chdir(folder_place)
    import train

    return train.main
