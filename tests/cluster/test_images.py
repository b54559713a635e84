"""What of this machine's pip configuration a build sees, and what counts as an image archive."""

from pathlib import Path

import pytest

import images
from cluster.images import pip_settings
from cluster.nodes import archive_ids
from cluster.process import ClusterError


def test_builds_reach_the_index_that_this_machine_uses_and_see_nothing_else(tmp_path: Path) -> None:
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nindex-url = from-file\nproxy = from-file\nuser = true\n")
    variables = {"PIP_CONFIG_FILE": str(config), "PIP_INDEX_URL": "from-variable", "PIP_TARGET": "/elsewhere"}
    settings = dict(pip_settings({"HOME": str(tmp_path), **variables})["global"])
    assert settings["index-url"] == "from-variable", "as pip itself decides"
    assert settings["proxy"] == "from-file"
    assert not {"user", "target", "config-file"} & set(settings)


def test_a_file_that_is_no_image_archive_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "image.tar").write_text("not a tar")
    with pytest.raises(ClusterError, match=r"image\.tar is no image archive"):
        archive_ids(tmp_path / "image.tar")


def test_a_disk_without_room_for_the_full_images_is_named_with_what_they_need() -> None:
    assert images.no_room(1) == ""
    assert "the full images need 1000000 GB of free disk at /" in images.no_room(10**15)
