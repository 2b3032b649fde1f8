"""`python -m vllm_defensive.planner`: what eviction saves on a model, before anything is started."""

import sys

from vllm_defensive.tools.planner import main

if __name__ == "__main__":
    sys.exit(main())
