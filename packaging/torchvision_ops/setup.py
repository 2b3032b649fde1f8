"""Lets PyPI's torchvision be imported beside torch's CPU build: image processors and vision models need it.

Why: PyPI's torchvision is compiled for CUDA, and its library of operators cannot be loaded beside a CPU torch. It
     takes that in its stride (who calls an operator is told), but it describes the results of two of them, and where
     these are not declared the import ends with "operator torchvision::nms does not exist".
How: `make setup` installs this where torchvision cannot be imported. torch calls it as it is imported, and the two are
     declared. Detectors, which do call operators, stay out of reach; no model that vLLM serves is one.
Until: PyPI has a torchvision for CPUs. From the index of torch's CPU wheels comes one that needs none of this.
"""

from setuptools import setup

setup(
    name="vllm-defensive-torchvision-ops",
    version="1",
    description="Declares the operators without which torchvision cannot be imported beside torch's CPU build",
    py_modules=["torchvision_ops"],
    entry_points={"torch.backends": ["torchvision_ops = torchvision_ops:declare"]},
)
