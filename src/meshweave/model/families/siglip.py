"""SigLIP vision towers: their blocks have CLIP's shape."""

from meshweave.model.families.clip import BLOCK_RULES
from meshweave.model.families.plan import CutPlan, TensorPlan

PLANS = {"siglip_vision_model": TensorPlan(rules=BLOCK_RULES)}

CUTS = {"siglip_vision_model": CutPlan(blocks="encoder.layers", before=("embeddings",), hidden="squares")}
