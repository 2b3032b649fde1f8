"""What the set-up, images and workflow install: the same releases of vLLM everywhere, and what these need."""

from __future__ import annotations

import os
import re
import subprocess
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import vllm_defensive
from tests.processes import run_python
from tests.releases import CPU_RELEASE, RELEASES

ROOT = Path(__file__).parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_extras_take_the_supported_releases_and_their_patches() -> None:
    extras = {
        extra: Requirement(line)
        for line in requires("vllm-defensive") or ()
        for extra in re.findall(r'^vllm.*extra == "(\w+)"', line)
    }
    assert str(extras["cpu"].specifier) == f"=={CPU_RELEASE}"
    inside = [*RELEASES, RELEASES[-1] + ".post1", re.sub(r"\d+$", "7", RELEASES[-1])]
    assert all(extras["cuda"].specifier.contains(release) for release in inside)
    assert not any(extras["cuda"].specifier.contains(release) for release in ("0.31.9", "0.34.0"))


@pytest.mark.parametrize("name, value", [("BACKEND", "tpu"), ("TOOLS", "2"), ("VLLM", "0.33.0")])
def test_the_set_up_refuses_a_wrong_setting_before_it_installs_anything(name: str, value: str, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "VENV": str(tmp_path / "venv"), name: value}
    done = subprocess.run([ROOT / "scripts" / "setup.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"{name}={value}: ")
    assert not (tmp_path / "venv").exists()


def test_the_stub_has_the_version_of_the_cpu_build() -> None:
    assert re.findall(r'name="vllm", version="([^"]+)"', read("packaging/vllm_stub/setup.py")) == [f"{CPU_RELEASE}+cpu"]


def test_the_workflow_the_image_and_the_readme_name_the_same_releases() -> None:
    workflow = yaml.safe_load(read(".github/workflows/ci.yml"))
    assert tuple(workflow["jobs"]["releases"]["strategy"]["matrix"]["vllm"]) == RELEASES
    assert set(re.findall(r"VLLM=(\d[\d.]+\d)", read("docker/Dockerfile"))) == set(RELEASES)
    rows = re.findall(
        r"^\| (0\.[\d.]+) \|", read("README.md").partition("| vLLM |")[2].partition("\n\n")[0], re.MULTILINE
    )
    assert tuple(rows) == RELEASES


def test_the_package_itself_goes_by_the_same_releases() -> None:
    contract = pytest.importorskip("vllm_defensive.compat.contract")
    assert [f"{major}.{minor}" for major, minor in contract.SUPPORTED] == [r.rpartition(".")[0] for r in RELEASES]


def test_the_workflow_pins_its_actions() -> None:
    used = re.findall(r"uses: (\S+)", read(".github/workflows/ci.yml"))
    assert used and all(re.fullmatch(r"actions/[a-z-]+@v\d+\.\d+\.\d+", action) for action in used)


def test_the_citation_has_our_version() -> None:
    assert yaml.safe_load(read("CITATION.cff"))["version"] == vllm_defensive.__version__


@pytest.mark.slow
def test_images_can_be_resized() -> None:
    """PyPI's torchvision cannot be imported beside torch's CPU build unless packaging/torchvision_ops is there."""
    code = """import torch
from torchvision.transforms.v2 import functional
print(functional.resize(torch.ones(1, 4, 4), [2]).tolist())"""
    assert run_python(code).strip() == str([[[1.0] * 2] * 2])


@pytest.mark.slow
def test_a_vision_model_can_be_imported() -> None:
    run_python("import vllm.model_executor.models.qwen3_5")
