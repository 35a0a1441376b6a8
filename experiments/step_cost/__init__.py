"""Measures a training step of each defense on this machine and in other libraries: time, FLOPs, memory."""
