"""Policies of other packages, found by the entry point group `vllm_defensive.policies`.

An entry point names a `Policy` or a function without arguments that returns one:

    entry_points={"vllm_defensive.policies": ["mine = my_package:policy"]}

Every process of an engine reads the group when it imports `vllm_defensive.policy`, so the package must be installed
wherever workers run.
"""

from __future__ import annotations

import warnings
from importlib.metadata import entry_points

from vllm_defensive.policy.definition import Policy
from vllm_defensive.policy.presets import register

GROUP = "vllm_defensive.policies"


def load() -> None:
    """Add what is installed to the table. A package that fails is named in a warning: it must not break the engine."""
    for entry in entry_points(group=GROUP):
        try:
            found = entry.load()
            policy = found if isinstance(found, Policy) else found()
            if not isinstance(policy, Policy):
                raise TypeError(f"expected a Policy, got {type(policy).__name__}")
            register(policy)
        except Exception as error:
            warnings.warn(f"{GROUP}: {entry.name} = {entry.value} is left out: {error}", stacklevel=2)
