"""The scheduler's process: which blocks a request holds, when it is evicted, and what the workers are told."""
