"""What was done and found, as JSON, as a page, as text."""
