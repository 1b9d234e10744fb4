"""SigLIP vision towers: their blocks have CLIP's shape."""

from meshweave.model.families.clip import BLOCK_RULES
from meshweave.model.families.plan import TensorPlan

PLANS = {"siglip_vision_model": TensorPlan(rules=BLOCK_RULES)}
