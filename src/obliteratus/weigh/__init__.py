"""WEIGH: where and how hard. Each step is one small function to a factor for each site; importing registers them."""

from obliteratus.weigh import kernels, layers
from obliteratus.weigh.steps import weigh_sites, weighers

__all__ = ["kernels", "layers", "weigh_sites", "weighers"]
