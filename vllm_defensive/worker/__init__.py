"""The workers: keep window queries, evict after the forward pass, attend over what was kept."""
