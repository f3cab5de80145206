"""Qwen3-VL (Bai et al. 2025, arXiv 2511.21631): pictures and questions to the next token.

Laid out as transformers' `Qwen3VLForConditionalGeneration`, for stills.
"""

from referee_jax.models.qwen3_vl.decoder import Config, Qwen3VL, TextConfig
from referee_jax.models.qwen3_vl.packing import Packing, pack
from referee_jax.models.qwen3_vl.vision import VisionConfig

__all__ = ["Config", "Packing", "Qwen3VL", "TextConfig", "VisionConfig", "pack"]
