"""What people have on disk besides directories: all networks in one file (original_layout.py), and LoRAs (lora.py)."""
