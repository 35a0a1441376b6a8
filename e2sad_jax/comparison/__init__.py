"""Compares defenses under one budget of training: robust accuracy against FLOPs."""
