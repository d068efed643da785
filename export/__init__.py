"""Turns a checkpoint into a bundle."""
