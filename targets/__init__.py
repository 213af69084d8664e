"""Targets: one TOML file each, and the kernel templates that they share."""
