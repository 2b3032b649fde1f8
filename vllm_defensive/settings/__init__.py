"""What the user asked for: parsed once, checked once, then frozen."""
