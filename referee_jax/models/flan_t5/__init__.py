"""T5 and Flan-T5 (t5.py), and a Flan-T5 that reads images: CLIP-FlanT5 (clip_t5.py)."""
