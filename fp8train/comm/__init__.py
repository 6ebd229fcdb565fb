"""Processes, groups and collectives."""
