"""What the operators of a model read, over samples of its inputs."""
