"""The codec hyper: trellis-coded values behind a random-sign Hadamard rotation."""
