"""Networks of generators: Stable Diffusion's and SDXL's U-Net (unet.py), and autoencoders' decoders (vae.py)."""
