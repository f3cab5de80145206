"""Chips, devices, processes and the cache of compiled programs."""
