"""Networks by the names of other packages and of users' files."""

from __future__ import annotations

import sys

import pytest
import torch
from image_folders import NETWORKS
from torch import nn

from fastkd.models import create_model, specs


@pytest.mark.interop
@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_networks_of_other_packages_have_no_weights_of_theirs(name, request, monkeypatch):
    request.getfixturevalue(name.partition(":")[0])
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *args, **kw: pytest.fail("downloads"))
    network = create_model(name, 3)
    assert network.train()(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_an_unknown_network_of_a_package_names_the_nearest(torchvision):
    with pytest.raises(ValueError, match=r"torchvision has no network 'resnet81', wanted one such as resnet"):
        create_model("torchvision:resnet81")


def test_a_users_file_is_imported_once_and_may_import_its_neighbours(tmp_path):
    (tmp_path / "nets.py").write_text(NETWORKS)
    (tmp_path / "mine.py").write_text(
        "from nets import student\n\n\ndef small(num_classes):\n    return student(num_classes)\n"
    )
    before = list(sys.path)
    one, other = (create_model(f"{tmp_path / 'mine.py'}:small", 4) for _ in range(2))
    assert type(one) is type(other) and one.head.out_features == 4 and sys.path == before
    del sys.modules["nets"]


def test_usual_points_are_found_and_others_are_suggested(tmp_path):
    (tmp_path / "nets.py").write_text(NETWORKS)
    student, plain = (create_model(f"{tmp_path / 'nets.py'}:{name}", 4) for name in ("student", "plain"))
    assert specs.stages_of(student) == ("layer1", "layer2") and specs.stages_of(plain) is None
    assert specs.stages_of(create_model("resnet8")) is None  # it shows its own
    assert specs.suggested(plain, (3, 32, 32)) == ["3"]
    declared = nn.Sequential(*(nn.Conv2d(3, 3, 3, 2, 1) for _ in range(5)))
    declared.feature_info = [{"module": str(i), "reduction": 2 ** (i + 1)} for i in range(5)]
    assert specs.stages_of(declared) == ("1", "2", "3", "4")
    for info in declared.feature_info:  # as a transformer's blocks, which are tokens
        info["reduction"] = 16
    assert specs.stages_of(declared) is None


def test_a_network_of_timm_names_its_stages(timm):
    assert specs.stages_of(create_model("timm:convnext_atto", 3)) == tuple(f"stages.{i}" for i in range(4))
    vit = create_model("timm:vit_tiny_patch16_224", 3)
    assert specs.stages_of(vit) is None and specs.declared_normalization(vit) == ((0.5,) * 3, (0.5,) * 3)
    for name in ("timm:hf-hub:some/thing", "timm:some/thing"):  # which timm would look up in a network
        with pytest.raises(ValueError, match="is not known|has no network"):
            create_model(name, 3)


def test_names_of_models_as_parts_of_names_of_files():
    assert specs.file_name("resnet8x4") == "resnet8x4"
    assert specs.file_name("torchvision:resnet18") == "torchvision-resnet18"
    one, other = (specs.file_name(f"{folder}/nets.py:small") for folder in ("a", "b"))
    assert one != other and one.startswith("nets.py-small-") and "/" not in one
