"""`python -m vllm_defensive.doctor [FOLDER]`: does eviction run on this vLLM, and is all that it leans on in another?

Prints what does not match, a line each. Ends with 0 if nothing does.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vllm_defensive.compat import contract
from vllm_defensive.compat.names import BY_SIDE


def main() -> None:
    parser = argparse.ArgumentParser("python -m vllm_defensive.doctor", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="a vllm package of any version: read, not imported")
    folder = parser.parse_args().folder
    if folder is not None and not (folder / "__init__.py").exists():
        parser.error(f"folder={folder}: name the folder of a package, such as .../site-packages/vllm")
    sides = contract.all_sides() if folder is None else tuple(BY_SIDE)
    mismatches = contract.check(sides, folder)
    for line in mismatches:
        print(line)
    if folder is None and not contract.is_supported(contract.installed()):
        sys.exit(contract.refusal())
    if mismatches:
        sys.exit(1)
    names = sum(len(rows) for side in sides for rows in BY_SIDE[side].values())
    print(f"vllm={folder or contract.installed()}: all {names} names that eviction leans on are as expected")


if __name__ == "__main__":
    main()
