"""Whether a result does what the original does."""
