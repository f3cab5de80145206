"""The engine: networks and compiled programs on the devices of a process."""
