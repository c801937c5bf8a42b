"""Adapters for a Mixtral: read part by part, trained under tensor and expert parallelism, exported for peft."""
