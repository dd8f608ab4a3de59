"""Inference on the CPU: the packed form of trained layers, and the native engine that runs it."""
