"""CatVTON: virtual try-on by concatenating person and garment in latent space (arXiv 2407.15886)."""

from __future__ import annotations

from model.catvton.checkpoint import load_attention_checkpoint
from model.catvton.pipeline import CatVTONPipeline, CatVTONPipelineOutput

__all__ = ["CatVTONPipeline", "CatVTONPipelineOutput", "load_attention_checkpoint"]
