"""What a training step of each defense costs on this machine: time, FLOPs, memory, and other libraries beside it."""
