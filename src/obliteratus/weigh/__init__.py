"""WEIGH: which sites to edit, and how strongly.

Each step is one function from directions to a factor for each site; importing this package registers all of them.
It may import core, and never transformers.
"""

from obliteratus.weigh import kernels, layers
from obliteratus.weigh.steps import weigh_sites, weighers

__all__ = ["kernels", "layers", "weigh_sites", "weighers"]
