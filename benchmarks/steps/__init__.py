"""What a step costs besides the model: scheduler, metadata builder and worker, and how the cost of evictions grows."""
