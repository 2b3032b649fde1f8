"""`python -m vllm_defensive.learn`: a learned score of a model, made in minutes from what the model has."""

import sys

from vllm_defensive.tools.learn import main

if __name__ == "__main__":
    sys.exit(main())
