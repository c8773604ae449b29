"""Where clients run: this process, worker processes, Flower."""
