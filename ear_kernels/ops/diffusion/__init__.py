"""A step back of a diffusion process over tokens."""
