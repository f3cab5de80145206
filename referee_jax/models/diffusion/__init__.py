"""Networks of generators: U-Nets (unet.py), transformers (sd3.py, flux.py), decoders (vae.py, tiny_vae.py), text (text.py)."""
