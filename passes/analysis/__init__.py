"""What a model holds: weights, their uses, and what is to be done with them."""
