"""Recordings for common tasks from a YAML file or flags."""
